"""Import torchvision even if its compiled operators cannot be loaded; torchmetrics imports it if installed."""

import torch

__all__ = ["torchvision"]

try:
    import torchvision.models.segmentation
except RuntimeError:
    # torchvision's wheel cannot load its compiled operators with another build of torch, such as the one for CPUs. Its
    # import then fails at the two operators that it registers with torch's compiler. Classifiers need neither, so it is
    # enough to declare them. A declaration lasts as long as its object.
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision.models.segmentation
