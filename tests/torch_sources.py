"""The torch modules whose files are ported, at any width, with the originals' names, registration order and forward.

Repeated lines of the originals are loops here. ``w`` scales channel counts as the project's ``width`` does.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice, pairwise

import torch
import torch.nn.functional as F
from torch import nn

# torchvision's models/vgg.py: A, B, D, E
CFGS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)


def stages(encoder: str, w: float) -> list[list[tuple[int, int]]]:
    """Channels in and out of each convolution, by stage."""
    out = [round(channels * w) for channels, n in zip(CHANNELS, CFGS[encoder], strict=True) for _ in range(n)]
    convs = pairwise([3, *out])
    return [list(islice(convs, n)) for n in CFGS[encoder]]


def make_layers(encoder: str, batch_norm: bool, w: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for stage in stages(encoder, w):
        for c_in, c_out in stage:
            norm = [nn.BatchNorm2d(c_out)] if batch_norm else []
            layers += [nn.Conv2d(c_in, c_out, kernel_size=3, padding=1), *norm, nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    return nn.Sequential(*layers)


class TorchvisionVGG(nn.Module):
    """torchvision/models/vgg.py"""

    def __init__(self, encoder: str, batch_norm: bool, w: float, num_classes: int) -> None:
        super().__init__()
        fc = round(4096 * w)
        self.features = make_layers(encoder, batch_norm, w)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        sizes = (round(512 * w) * 7 * 7, fc, fc, num_classes)
        layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU(True), nn.Dropout(p=0.5))]
        self.classifier = nn.Sequential(*layers[:-2])

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class TimmVGG(nn.Module):
    """timm/models/vgg.py; the head's pooling and all dropout have no tensors."""

    def __init__(self, encoder: str, batch_norm: bool, w: float, num_classes: int) -> None:
        super().__init__()
        self.features = make_layers(encoder, batch_norm, w)
        fc6, fc7 = nn.Conv2d(round(512 * w), round(4096 * w), 7), nn.Conv2d(round(4096 * w), round(4096 * w), 1)
        self.pre_logits = nn.Sequential(OrderedDict(fc1=fc6, act1=nn.ReLU(), fc2=fc7, act2=nn.ReLU()))  # ConvMlp
        self.head = nn.Module()
        self.head.fc = nn.Linear(round(4096 * w), num_classes)

    def forward(self, x):
        return self.head.fc(self.pre_logits(self.features(x)).mean((2, 3)))


class PytorchFCN(nn.Module):
    """torchfcn/models/fcn32s.py, fcn16s.py, fcn8s.py; ``at_once`` is FCN8sAtOnce"""

    fc = ("fc6", "fc7")
    scores = {
        32: ("score_fr", "upscore"),
        16: ("score_fr", "score_pool4", "upscore2", "upscore16"),
        8: ("score_fr", "score_pool3", "score_pool4", "upscore2", "upscore8", "upscore_pool4"),
    }
    second = "upscore_pool4"
    without_bias: tuple[tuple[str, int], ...] = ()
    ceil_mode = True
    crop = {32: 19, 16: 27, 8: 31}

    @staticmethod
    def conv(stage: int, layer: int, index: int) -> str:
        return f"conv{stage}_{layer}"

    def __init__(self, stride: int, n: int, w: float, at_once: bool = False) -> None:
        super().__init__()
        self.stride, self.scales = stride, (0.01, 0.0001) if at_once else (1, 1)
        self.names: list[list[str]] = []
        for stage, convs in enumerate(stages("vgg16", w), start=1):
            self.names.append([])
            for layer, (c_in, c) in enumerate(convs, start=1):
                index = sum(map(len, self.names)) + 1
                self.names[-1].append(self.conv(stage, layer, index))
                setattr(self, self.names[-1][-1], nn.Conv2d(c_in, c, 3, padding=100 if index == 1 else 1))
        fc = round(4096 * w)
        setattr(self, self.fc[0], nn.Conv2d(c, fc, 7))
        setattr(self, self.fc[1], nn.Conv2d(fc, fc, 1))
        inputs = {"score_fr": fc, "score_pool3": round(256 * w), "score_pool4": c}
        for name in self.scores[stride]:
            up = {"upscore2": 2, self.second: 2}.get(name, stride)
            if name in inputs:
                setattr(self, name, nn.Conv2d(inputs[name], n, 1, bias=(name, stride) not in self.without_bias))
            else:
                setattr(self, name, nn.ConvTranspose2d(n, n, 2 * up, stride=up, bias=False))

    def forward(self, x):
        h, pools = x, []
        for names in self.names:
            for name in names:
                h = F.relu(getattr(self, name)(h))
            h = F.max_pool2d(h, 2, stride=2, ceil_mode=self.ceil_mode)
            pools.append(h)
        for name in self.fc:
            h = F.relu(getattr(self, name)(h))
        h = self.score_fr(h)
        if self.stride <= 16:
            h = self.upscore2(h)
            h = h + self.score_pool4(pools[3] * self.scales[0])[:, :, 5 : 5 + h.size(2), 5 : 5 + h.size(3)]
        if self.stride == 8:
            h = getattr(self, self.second)(h)
            h = h + self.score_pool3(pools[2] * self.scales[1])[:, :, 9 : 9 + h.size(2), 9 : 9 + h.size(3)]
        h = (self.upscore if hasattr(self, "upscore") else getattr(self, f"upscore{self.stride}"))(h)
        c = self.crop[self.stride]
        return h[:, :, c : c + x.size(2), c : c + x.size(3)]


class Fanrencli(PytorchFCN):
    """VGG16 of Fanrencli's FCN: FCN32s, FCN16s, FCN8s"""

    fc = ("conv14", "conv15")
    scores = {
        32: ("score_fr", "upscore32"),
        16: ("score_fr", "upscore16", "upscore2", "score_pool4"),
        8: ("score_fr", "score_pool3", "score_pool4", "upscore2", "upscore8", "upscore2x2"),
    }
    second = "upscore2x2"
    without_bias = (("score_pool4", 16),)
    ceil_mode = False
    crop = {32: 6, 16: 27, 8: 31}

    @staticmethod
    def conv(stage: int, layer: int, index: int) -> str:
        return f"conv{index}"


def tramac_head(c_in: int, n: int) -> nn.Module:
    """_FCNHead"""
    c = c_in // 4
    conv = (nn.Conv2d(c_in, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True))
    return nn.Sequential(OrderedDict(block=nn.Sequential(*conv, nn.Dropout(0.1), nn.Conv2d(c, n, 1))))


class Tramac(nn.Module):
    """core/models/fcn.py of awesome-semantic-segmentation-pytorch: FCN32s, FCN16s, FCN8s"""

    def __init__(self, stride: int, n: int, w: float, aux: bool = False) -> None:
        super().__init__()
        c, whole = round(512 * w), make_layers("vgg16", False, w)
        self.pretrained = whole
        slices = {32: {}, 16: {"pool4": whole[:24], "pool5": whole[24:]}}
        slices[8] = {"pool3": whole[:17], "pool4": whole[17:24], "pool5": whole[24:]}
        self.parts = tuple(slices[stride] or ("pretrained",))
        for name, layers in slices[stride].items():
            setattr(self, name, nn.Sequential(*layers))
        self.head = tramac_head(c, n)
        if stride == 8:
            self.score_pool3 = nn.Conv2d(round(256 * w), n, 1)
        if stride <= 16:
            self.score_pool4 = nn.Conv2d(c, n, 1)
        if aux:
            self.auxlayer = tramac_head(c, n)

    def forward(self, x):
        def resize(score, size):
            return F.interpolate(score, size, mode="bilinear", align_corners=True)

        h, maps = x, {}
        for name in self.parts:
            h = maps[name] = getattr(self, name)(h)
        h = self.head(h)
        for name in self.parts[-2::-1]:
            score = getattr(self, f"score_{name}")(maps[name])
            h = resize(h, score.size()[2:]) + score
        return resize(h, x.size()[2:])


def _add_rungs(module: nn.Module, n: int, w: float) -> None:
    c_in = round(512 * w)
    for rung, channels in enumerate((512, 256, 128, 64, 32), start=1):
        c = round(channels * w)
        deconv = nn.ConvTranspose2d(c_in, c, kernel_size=3, stride=2, padding=1, dilation=1, output_padding=1)
        setattr(module, f"deconv{rung}", deconv)
        setattr(module, f"bn{rung}", nn.BatchNorm2d(c))
        c_in = c
    module.classifier = nn.Conv2d(c_in, n, kernel_size=1)


class Pochih(nn.Module):
    """FCN32s, FCN16s, FCN8s, FCNs of pochih, as in gaussian37's notes; ``kind`` is 32, 16, 8 or "s" """

    def __init__(self, kind: int | str, n: int, w: float, encoder: str = "vgg16") -> None:
        super().__init__()
        self.kind = kind
        self.pretrained_net = nn.Sequential(OrderedDict(features=make_layers(encoder, False, w)))
        _add_rungs(self, n, w)

    def forward(self, x):
        pools = []
        for layer in self.pretrained_net.features:
            x = layer(x)
            pools += [x] if isinstance(layer, nn.MaxPool2d) else []
        return _ladder(self, pools, self.kind)


def _ladder(m, pools, kind):
    x1, x2, x3, x4, score = pools
    between = {32: {}, 16: {1: x4}, 8: {1: x4, 2: x3}, "s": {}}[kind]  # between ReLU and BN
    after = {1: x4, 2: x3, 3: x2, 4: x1} if kind == "s" else {}
    for rung in range(1, 6):
        score = F.relu(getattr(m, f"deconv{rung}")(score)) + between.get(rung, 0)
        score = getattr(m, f"bn{rung}")(score) + after.get(rung, 0)
    return m.classifier(score)


class FCN1(nn.Module):
    """FCN1 of the FCN1 notes"""

    def __init__(self, n: int, w: float) -> None:
        super().__init__()
        for stage, ((c_in, c), _) in enumerate(stages("vgg13", w), start=1):
            convs = (nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1), nn.ReLU())
            setattr(self, f"block{stage}", nn.Sequential(*convs, nn.MaxPool2d(2)))
        _add_rungs(self, n, w)

    def forward(self, x):
        pools = []
        for stage in range(1, 6):
            x = getattr(self, f"block{stage}")(x)
            pools.append(x)
        return _ladder(self, pools, "s")


def _cbr(c_in: int, c_out: int, kernel_size: int = 3, padding: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel_size, 1, padding), nn.ReLU(inplace=True))


class Boostcamp(nn.Module):
    """FCN32s, FCN16s, FCN8s of the Boostcamp notes"""

    def __init__(self, stride: int, n: int, w: float) -> None:
        super().__init__()
        self.stride = stride
        for stage, convs in enumerate(stages("vgg16", w), start=1):
            for layer, (c_in, c) in enumerate(convs, start=1):
                setattr(self, f"conv{stage}_{layer}", _cbr(c_in, c))
            if (stage, stride) in ((3, 8), (4, 8), (4, 16)):
                setattr(self, f"score_pool{stage}_fr", nn.Conv2d(c, n, kernel_size=1))
        fc, block = round(4096 * w), _cbr if stride == 32 else nn.Conv2d
        self.fc6 = block(c, fc, kernel_size=1, padding=0)
        self.fc7 = block(fc, fc, kernel_size=1, padding=0)
        self.score_fr = nn.Conv2d(fc, n, kernel_size=1)
        if stride <= 16:
            self.upscore2 = nn.ConvTranspose2d(n, n, kernel_size=4, stride=2, padding=1)
        if stride == 8:
            self.upscore2_pool4 = nn.ConvTranspose2d(n, n, kernel_size=4, stride=2, padding=1)
        up = nn.ConvTranspose2d(n, n, kernel_size=2 * stride, stride=stride, padding=stride // 2)
        setattr(self, f"upscore{stride}", up)

    def forward(self, x):
        h, pools = x, []
        for stage, convs in enumerate(CFGS["vgg16"], start=1):
            for layer in range(1, convs + 1):
                h = getattr(self, f"conv{stage}_{layer}")(h)
            h = F.max_pool2d(h, 2, stride=2, ceil_mode=True)
            pools.append(h)
        h = self.score_fr(F.relu(self.fc7(F.relu(self.fc6(h)))))
        if self.stride <= 16:
            h = self.upscore2(h) + self.score_pool4_fr(pools[3])
        if self.stride == 8:
            h = self.upscore2_pool4(h) + self.score_pool3_fr(pools[2])
        return getattr(self, f"upscore{self.stride}")(h)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor of a network its own values, of a size that keeps activations near 1, in float64."""
    module = module.double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if value.ndim >= 2:
            fan_in = value[0].numel() / (4 if "upscore" in name or "deconv" in name else 1)
            value.copy_(noise * (2 / fan_in) ** 0.5)
        elif name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        else:
            value.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))
    return module
