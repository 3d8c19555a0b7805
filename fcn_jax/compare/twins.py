"""Every family as a plain PyTorch module, written from the networks' torch sources and not from our JAX code.

Images are (b, 3, h, w), logits (b, num_classes, h, w). Parameters are named after the Flax tree, joined by dots, with
torch's own leaf names: ``vgg.conv1_1.weight``, ``vgg.bn1_1.running_mean``, ``head.fc6.weight``, ``upscore8.weight``.
Comments marked "Ours:" are additions, so that image sizes that the sources do not support can be compared too.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcn_jax.models.fcn import FCN, DilatedFCN, InterpolatedFCN, LadderFCN, Pad100FCN, ResizeFCN, SameFCN, ScoreFCN

# torchvision's models/vgg.py, `cfgs` A, B, D, E: the convolutions before each pooling; they have _CHANNELS outputs.
_CFG = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_CHANNELS = (64, 128, 256, 512, 512)


def make_twin(model: FCN) -> nn.Module:
    """Build the PyTorch network of ``model``'s family and options, in training mode, with torch's initial values.

    It maps images (b, 3, h, w) to logits (b, num_classes, h, w), with ``aux_head`` in training to (logits, auxiliary
    logits), and loads ``fcn_jax.weights.to_torch(model, variables)``. Its parameters have ``model.param_dtype``;
    ``remat``, ``precision`` and ``axis_name`` have no counterpart.
    """
    twins = {SameFCN: _SameTwin, Pad100FCN: _Pad100Twin, LadderFCN: _LadderTwin, ResizeFCN: _ResizeTwin}
    twin: Any = (twins | {DilatedFCN: _DilatedTwin}).get(type(model))
    if twin is None:
        raise ValueError(f"expected a network of the catalogue, got {type(model).__name__}; use fcn_jax.create_model")
    return twin(model).to({"float64": torch.float64, "float32": torch.float32}[jnp.dtype(model.param_dtype).name])


def _channels(count: int, width: float) -> int:
    return max(1, round(count * width))


def _dropout(model: ScoreFCN | InterpolatedFCN) -> nn.Module:
    return nn.Dropout2d(model.dropout_rate) if model.dropout == "channel" else nn.Dropout(model.dropout_rate)


class _VGG(nn.Module):
    """torchvision's `make_layers` with the paper's layer names; returns pool1 ... pool5."""

    def __init__(self, model: FCN, ceil_mode: bool, margin: int = 1) -> None:
        super().__init__()
        self.stages: list[list[str]] = []
        self.norm, self.frozen, in_channels = model.encoder_norm == "batch", model.freeze_stages, 3
        for stage, (count, channels) in enumerate(zip(_CFG[model.encoder], _CHANNELS, strict=True), start=1):
            self.stages.append([f"{stage}_{layer}" for layer in range(1, count + 1)])
            for name in self.stages[-1]:
                out_channels, padding = _channels(channels, model.width), margin if name == "1_1" else 1
                self.add_module(f"conv{name}", nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=padding))
                if self.norm:
                    self.add_module(f"bn{name}", nn.BatchNorm2d(out_channels))
                in_channels = out_channels
        self.out_channels = in_channels
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=ceil_mode)

    def train(self, mode: bool = True) -> _VGG:
        super().train(mode)
        for names in self.stages[: self.frozen]:
            for name in names * self.norm:
                self.get_submodule(f"bn{name}").eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        pools = []
        for index, names in enumerate(self.stages):
            for name in names:
                x = self.get_submodule(f"conv{name}")(x)
                x = F.relu(self.get_submodule(f"bn{name}")(x) if self.norm else x)
            x = self.pool(x)
            x = x.detach() if index < self.frozen else x
            pools.append(x)
        return pools


class _VGGHead(nn.Module):
    """fc6, ReLU, dropout, fc7, ReLU, dropout: Fanrencli's and Boostcamp's networks, pytorch-fcn's models/fcn32s.py."""

    def __init__(self, model: ScoreFCN, in_channels: int, padding: str) -> None:
        super().__init__()
        self.fc6 = nn.Conv2d(in_channels, model.fc_features, model.fc6_kernel, padding=padding)
        self.drop6 = _dropout(model)
        self.fc7 = nn.Conv2d(model.fc_features, model.fc_features, 1)
        self.drop7 = _dropout(model)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop6(F.relu(self.fc6(x)))
        return self.drop7(F.relu(self.fc7(x)))


class _ScoreTwin(nn.Module):
    """The layers that `same` and `pad100` share; only ``margin`` and the padding differ."""

    def __init__(self, model: ScoreFCN, margin: int, padding: str) -> None:
        super().__init__()
        n, self.stride, self.scales = model.num_classes, model.stride, model.skip_scales
        self.vgg = _VGG(model, ceil_mode=model.pool == "ceil", margin=margin)
        self.head = _VGGHead(model, self.vgg.out_channels, padding)
        self.score_fr = nn.Conv2d(model.fc_features, n, kernel_size=1)

        def up(factor: int) -> nn.Module:
            cut = factor // 2 if padding == "same" else 0
            # Ours: an optional bias on the transposed convolutions of `pad100`.
            return nn.ConvTranspose2d(n, n, 2 * factor, stride=factor, padding=cut, bias=model.upsample_bias)

        if self.stride <= 16:
            self.score_pool4 = nn.Conv2d(_channels(512, model.width), n, kernel_size=1, bias=model.skip_bias)
            self.upscore2 = up(2)
        if self.stride <= 8:
            self.score_pool3 = nn.Conv2d(_channels(256, model.width), n, kernel_size=1, bias=model.skip_bias)
            self.upscore_pool4 = up(2)
        self.add_module(f"upscore{self.stride}", up(self.stride))

    def upscore(self, x: Tensor) -> Tensor:
        return self.get_submodule(f"upscore{self.stride}")(x)


class _SameTwin(_ScoreTwin):
    """The Boostcamp notes' networks. Their fc6 is 1x1. Ours: a k x k fc6 padded to keep the size."""

    def __init__(self, model: SameFCN) -> None:
        super().__init__(model, margin=1, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        _, _, pool3, pool4, h = self.vgg(x)
        h = self.score_fr(self.head(h))
        # The source adds without cropping and returns the last map uncropped, which works only if the shapes match.
        # Ours: the slices, and the factors on pool4 and pool3.
        if self.stride <= 16:
            skip = self.score_pool4(self.scales[0] * pool4)
            h = self.upscore2(h)[:, :, : skip.size(2), : skip.size(3)] + skip
        if self.stride <= 8:
            skip = self.score_pool3(self.scales[1] * pool3)
            h = self.upscore_pool4(h)[:, :, : skip.size(2), : skip.size(3)] + skip
        return self.upscore(h)[:, :, : x.size(2), : x.size(3)]


class _Pad100Twin(_ScoreTwin):
    """Fanrencli (floor pooling) and pytorch-fcn (ceil pooling, factors 'at once'): their layers and their slices."""

    def __init__(self, model: Pad100FCN) -> None:
        super().__init__(model, margin=100, padding="valid")
        self.crop = model.crop  # 5, 9 and 19 / 27 / 31; Fanrencli's 32s: 6

    def forward(self, x: Tensor) -> Tensor:
        h = x
        _, _, pool3, pool4, x = self.vgg(x)
        x = self.score_fr(self.head(x))
        a, b, c = self.crop
        if self.stride <= 16:
            x = self.upscore2(x)
            pool4 = self.score_pool4(pool4 * self.scales[0])
            x = x + pool4[:, :, a : a + x.size(2), a : a + x.size(3)]
        if self.stride <= 8:
            x = self.upscore_pool4(x)
            pool3 = self.score_pool3(pool3 * self.scales[1])
            x = x + pool3[:, :, b : b + x.size(2), b : b + x.size(3)]
        return self.upscore(x)[:, :, c : c + h.size(2), c : c + h.size(3)].contiguous()


class _LadderTwin(nn.Module):
    """pochih's and FCN1's networks; the order of ReLU, addition and BN follows each network."""

    def __init__(self, model: LadderFCN) -> None:
        super().__init__()
        self.stride, self.fcns = model.stride, model.skip_after_norm
        self.vgg = _VGG(model, ceil_mode=False)
        in_channels = self.vgg.out_channels
        for rung, channels in enumerate((512, 256, 128, 64, 32), start=1):
            features = _channels(channels, model.width)
            deconv = nn.ConvTranspose2d(in_channels, features, 3, stride=2, padding=1, output_padding=1)
            self.add_module(f"deconv{rung}", deconv)
            self.add_module(f"bn{rung}", nn.BatchNorm2d(features))
            in_channels = features
        self.classifier = nn.Conv2d(in_channels, model.num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        # Ours: the padding to multiples of 32, which the sources require, and the crop at the end.
        x1, x2, x3, x4, score = self.vgg(F.pad(x, (0, -w % 32, 0, -h % 32)))
        skips: list[Tensor] = {32: [], 16: [x4], 8: [x4, x3], 2: [x4, x3, x2, x1]}[self.stride]
        for rung in range(1, 6):
            score = F.relu(self.get_submodule(f"deconv{rung}")(score))
            if skips and not self.fcns:
                score = score + skips.pop(0)
            score = self.get_submodule(f"bn{rung}")(score)
            if skips and self.fcns:
                score = score + skips.pop(0)
        return self.classifier(score)[:, :, :h, :w]


class _SmallHead(nn.Module):
    """Tramac's `_FCNHead`, torchvision's `FCNHead`, with named layers."""

    def __init__(self, model: InterpolatedFCN, in_channels: int, features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, features, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(features)
        self.drop = _dropout(model)
        self.score = nn.Conv2d(features, model.num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.drop(F.relu(self.bn(self.conv(x)))))


class _ResizeTwin(nn.Module):
    """Tramac's core/models/fcn.py."""

    def __init__(self, model: ResizeFCN) -> None:
        super().__init__()
        n, self.stride = model.num_classes, model.stride
        self.vgg = _VGG(model, ceil_mode=False)
        self.head = _SmallHead(model, self.vgg.out_channels, model.head_features)
        if self.stride <= 16:
            self.score_pool4 = nn.Conv2d(_channels(512, model.width), n, 1)
        if self.stride <= 8:
            self.score_pool3 = nn.Conv2d(_channels(256, model.width), n, 1)
        self.aux = _SmallHead(model, self.vgg.out_channels, model.head_features) if model.aux_head else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h, w = x.shape[2:]
        # Ours: the padding of sides below 32 to 32, and the crop of both outputs.
        x = F.pad(x, (0, max(0, 32 - w), 0, max(0, 32 - h)))
        _, _, pool3, pool4, pool5 = self.vgg(x)
        score = self.head(pool5)
        if self.stride <= 16:
            skip = self.score_pool4(pool4)
            score = F.interpolate(score, skip.size()[2:], mode="bilinear", align_corners=True) + skip
        if self.stride <= 8:
            skip = self.score_pool3(pool3)
            score = F.interpolate(score, skip.size()[2:], mode="bilinear", align_corners=True) + skip
        out = F.interpolate(score, x.size()[2:], mode="bilinear", align_corners=True)[:, :, :h, :w]
        if self.aux is not None and self.training:
            aux = F.interpolate(self.aux(pool5), x.size()[2:], mode="bilinear", align_corners=True)
            return out, aux[:, :, :h, :w]
        return out


class _Bottleneck(nn.Module):
    """torchvision's `Bottleneck` (models/resnet.py)."""

    def __init__(self, inplanes: int, planes: int, stride: int, dilation: int, shortcut: bool) -> None:
        super().__init__()
        self.has_shortcut = shortcut
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        if shortcut:
            self.downsample_conv = nn.Conv2d(inplanes, 4 * planes, 1, stride, bias=False)
            self.downsample_bn = nn.BatchNorm2d(4 * planes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.has_shortcut:
            x = self.downsample_bn(self.downsample_conv(x))
        return F.relu(out + x)


class _ResNet(nn.Module):
    """torchvision's `ResNet` with `_make_layer`, its last two strides replaced by dilation; returns layer3, layer4."""

    def __init__(self, model: DilatedFCN) -> None:
        super().__init__()
        inplanes, dilation, self.frozen = _channels(64, model.width), 1, model.freeze_stages
        self.conv1 = nn.Conv2d(3, inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.stages: list[list[str]] = [["bn1"]]
        for layer, blocks in enumerate({"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}[model.encoder], 1):
            planes, previous, stride = _channels(64 * 2 ** (layer - 1), model.width), dilation, 2 if layer > 1 else 1
            if layer >= 3:  # replace_stride_with_dilation
                dilation, stride = dilation * stride, 1
            self.stages.append([f"layer{layer}_{index}" for index in range(blocks)])
            for index, name in enumerate(self.stages[-1]):
                first = index == 0
                geometry = (stride, previous) if first else (1, dilation)
                self.add_module(name, _Bottleneck(inplanes, planes, *geometry, shortcut=first))
                inplanes = 4 * planes
        self.out_channels = inplanes

    def train(self, mode: bool = True) -> _ResNet:
        super().train(mode)
        for name in sum(self.stages[: self.frozen], []):
            self.get_submodule(name).eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), kernel_size=3, stride=2, padding=1)
        x = x.detach() if self.frozen else x
        maps = []
        for stage, names in enumerate(self.stages[1:], start=2):
            for name in names:
                x = self.get_submodule(name)(x)
            x = x.detach() if stage <= self.frozen else x
            maps.append(x)
        return maps[-2:]


class _DilatedTwin(nn.Module):
    """torchvision's models/segmentation/fcn.py and _utils.py."""

    def __init__(self, model: DilatedFCN) -> None:
        super().__init__()
        self.resnet = _ResNet(model)
        out_channels, features = self.resnet.out_channels, model.head_features
        self.head = _SmallHead(model, out_channels, features)
        self.aux = _SmallHead(model, out_channels // 2, max(1, features // 2)) if model.aux_head else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        layer3, layer4 = self.resnet(x)
        out = F.interpolate(self.head(layer4), x.shape[-2:], mode="bilinear", align_corners=False)
        if self.aux is not None and self.training:
            return out, F.interpolate(self.aux(layer3), x.shape[-2:], mode="bilinear", align_corners=False)
        return out
