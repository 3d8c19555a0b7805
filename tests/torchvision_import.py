"""torchvision, also where its compiled operators cannot be loaded; torchmetrics imports it where it is installed."""

import torch

__all__ = ["torchvision"]

try:
    import torchvision.models.segmentation
except RuntimeError:
    # torchvision's wheel cannot load its compiled operators beside another build of torch than its own, such as the one
    # for CPUs, and its import then fails at the two that it describes to torch's compiler. Classifiers need neither, so
    # it is enough to declare them; a declaration lasts as long as its object.
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision.models.segmentation
