"""Training recipes by name: the config, its source, and the score that the source reports."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fcn_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig

DEFAULT_RECIPE = "shapes"


@dataclass(frozen=True)
class Recipe:
    """A config with its source and the score reported there."""

    name: str
    config: Config
    source: str
    """Where the settings come from, and where ours differ."""
    score: str
    """What the source reports."""
    needs: str = ""
    """Arguments that the user has to add."""

    @property
    def command(self) -> str:
        """The command line that runs it."""
        return f"python train.py {self.name} {self.needs}".rstrip()


_PAPER_DATA = DataConfig(train="sbd/train", val="voc/seg11valid", preprocessing="caffe", flip=False)
# solver.prototxt and net.py of voc-fcn32s: the loss is summed over one image's pixels, deconvolutions stay bilinear.
_PAPER_OPTIM = OptimConfig(
    lr=1e-10, momentum=0.99, weight_decay=5e-4, bias_lr=2.0, bias_decay=False, freeze_upsampling=True
)
_PAPER = Config(
    data=_PAPER_DATA,
    loss=LossConfig(reduction="sum"),
    optim=_PAPER_OPTIM,
    train=TrainConfig(batch_size=1, steps=100_000, eval_batch_size=1),
)
# The VGG weights that the reference starts from.
_CAFFE_VGG = "vgg16-caffe"
# Name, network, learning rate, steps, weights or run to start from, and the released scores on seg11valid.
_PAPER_STAGES = (
    ("voc-paper-32s", "fcn32s_pad100", 1e-10, 100_000, _CAFFE_VGG, None, "90.48/76.48/63.63/83.46"),
    ("voc-paper-16s", "fcn16s_pad100", 1e-12, 100_000, None, "runs/voc-paper-32s", "91.00/78.07/65.01/84.26"),
    ("voc-paper-8s", "fcn8s_pad100", 1e-14, 100_000, None, "runs/voc-paper-16s", "91.22/77.61/65.51/84.54"),
    ("voc-paper-8s-atonce", "fcn8s_pad100_atonce", 1e-10, 300_000, _CAFFE_VGG, None, "91.13/78.50/65.40/84.43"),
)

_RECIPES = (
    Recipe(
        "shapes",
        Config(
            run="runs/shapes",
            model=ModelConfig(
                name="fcn8s",
                encoder="vgg11",
                encoder_norm="batch",
                width=0.25,
                fc_features=256,
                fc6_kernel=3,
                dropout_rate=0.1,
            ),
            data=DataConfig(train="shapes/train", val="shapes/val"),
            optim=OptimConfig(lr=0.2, momentum=0.9, weight_decay=5e-4, schedule="poly", warmup_steps=20),
            train=TrainConfig(batch_size=8, epochs=8, eval_batch_size=32, eval_every=2),
        ),
        source="this project; everything is generated, nothing is downloaded",
        score="see the README",
    ),
    Recipe(
        "own",
        Config(
            run="runs/own",
            init="vgg16_bn-imagenet",
            model=ModelConfig(name="fcn8s", encoder_norm="batch", fc6_kernel=3, fc_features=512, dropout_rate=0.2),
            data=DataConfig(
                train="folder/train",
                val="folder/val",
                base_size=384,
                crop_size=(320, 320),
                scale=(0.75, 1.5),
                jitter=0.2,
                workers=2,
            ),
            optim=OptimConfig(lr=0.01, weight_decay=5e-4, schedule="poly", warmup_steps=20, clip_norm=5.0),
            train=TrainConfig(batch_size=8, epochs=50, eval_every=5, eval_batch_size=1),
        ),
        source="this project, for your own images and masks; FCN-8s from ImageNet weights",
        score="none: it is for your data (docs/own-data.md)",
        needs="--data.dir DIR",
    ),
    Recipe(
        "camvid",
        Config(
            run="runs/camvid",
            model=ModelConfig(name="fcn8s", encoder_norm="batch", fc6_kernel=3, fc_features=1024, dropout_rate=0.2),
            data=DataConfig(
                train="camvid/train", val="camvid/val", crop_size=(352, 480), scale=(0.5, 2.0), jitter=0.3, workers=2
            ),
            loss=LossConfig(class_weights="median", weight_power=0.5),
            optim=OptimConfig(lr=0.05, weight_decay=5e-4, schedule="poly", warmup_steps=100, clip_norm=5.0),
            train=TrainConfig(batch_size=8, epochs=400, eval_every=20, eval_batch_size=4),
        ),
        source="this project; split and classes of the SegNet tutorial; choices in docs/camvid.md",
        score="57.0 mean IoU on test for FCN-8s from ImageNet weights (Jegou et al. 2017)",
        needs="--data.dir CAMVID",
    ),
    Recipe(
        "camvid-vgg16",
        Config(
            run="runs/camvid-vgg16",
            init=_CAFFE_VGG,
            model=ModelConfig(name="fcn8s", fc6_kernel=3, fc_features=512, dropout_rate=0.2, skip_scales=(0.05, 0.01)),
            data=DataConfig(
                train="camvid/train",
                val="camvid/val",
                preprocessing="caffe",
                crop_size=(360, 480),
                scale=(0.75, 1.5),
                jitter=0.1,
            ),
            loss=LossConfig(class_weights="median", weight_power=0.5),
            optim=OptimConfig(lr=6e-4, head_lr=10, weight_decay=5e-4, schedule="poly", warmup_steps=10, clip_norm=20.0),
            train=TrainConfig(batch_size=2, epochs=8, eval_every=2, eval_batch_size=4),
        ),
        source="this project: FCN-8s at full width from VGG-16's ImageNet convolutions; choices in docs/camvid.md",
        score="58.5 mean IoU on test, mean of two seeds (docs/camvid.md)",
        needs="--data.dir CAMVID",
    ),
    Recipe(
        "camvid-cpu",
        Config(
            run="runs/camvid-cpu",
            model=ModelConfig(
                name="fcn8s", encoder_norm="batch", width=0.25, fc6_kernel=3, fc_features=256, dropout_rate=0.2
            ),
            data=DataConfig(
                train="camvid/train",
                val="camvid/val",
                input_size=(270, 360),
                crop_size=(176, 240),
                scale=(0.5, 1.6),
                jitter=0.3,
            ),
            loss=LossConfig(class_weights="median", weight_power=0.5),
            optim=OptimConfig(lr=0.05, weight_decay=5e-4, schedule="poly", warmup_steps=100, clip_norm=5.0),
            train=TrainConfig(batch_size=8, epochs=110, eval_every=22, eval_batch_size=4),
        ),
        source="this project: trains in 45 minutes on two CPU cores; scored on the full 360x480 labels",
        score="53.1 mean IoU on test, mean of two seeds (docs/camvid.md)",
        needs="--data.dir CAMVID",
    ),
    *(
        Recipe(
            name,
            replace(
                _PAPER,
                run=f"runs/{name}",
                model=ModelConfig(name=model),
                optim=replace(_PAPER_OPTIM, lr=lr),
                train=replace(_PAPER.train, steps=steps),
                init=init,
                init_from=init_from,
            ),
            source="Shelhamer, Long & Darrell 2017, 'heavy' learning; solver.prototxt of the reference",
            score=f"{score} on seg11valid (pixel/mean acc/mean IoU/f.w. IoU)",
            needs="--data.dir ROOT",
        )
        for name, model, lr, steps, init, init_from, score in _PAPER_STAGES
    ),
    Recipe(
        "voc-cvpr",
        Config(
            run="runs/voc-cvpr",
            init=_CAFFE_VGG,
            model=ModelConfig(name="fcn32s_pad100"),
            data=replace(_PAPER_DATA, crop_size=(500, 500)),
            optim=replace(_PAPER_OPTIM, lr=1e-4, momentum=0.9),
            train=TrainConfig(batch_size=20, epochs=175, eval_every=5, eval_batch_size=1),
        ),
        source="Long, Shelhamer & Darrell 2015, section 4.3; here images are padded to 500x500 with ignored pixels, "
        "so that they fit in one batch",
        score="89.1/73.3/59.4/81.4 for 32s, 90.3/75.9/62.7/83.2 for 8s (Table 2)",
        needs="--data.dir ROOT",
    ),
    Recipe(
        "voc-tramac",
        Config(
            run="runs/voc-tramac",
            init="vgg16-imagenet",
            model=ModelConfig(name="fcn8s_resize"),
            data=DataConfig(
                train="voc/train",
                val="voc/val",
                crop_size=(480, 480),
                base_size=520,
                scale=(0.5, 2.0),
                workers=2,
            ),
            optim=OptimConfig(lr=1e-4, weight_decay=1e-4, head_lr=10.0, schedule="poly", poly_power=0.9),
            train=TrainConfig(batch_size=4, epochs=60, eval_batch_size=1),
        ),
        source="Tramac's awesome-semantic-segmentation-pytorch; here scores are of whole images over the whole set, "
        "there of centre crops, averaged over images",
        score="47.38 mean IoU, 87.12 pixel accuracy (a rerun; 48.87 and 85.02 in the repository's table)",
        needs="--data.dir ROOT",
    ),
    Recipe(
        "voc-torchvision",
        Config(
            run="runs/voc-torchvision",
            init="resnet50-imagenet",
            model=ModelConfig(name="fcn_resnet50", aux_head=True),
            data=DataConfig(
                train="sbd/train",
                val="voc/seg11valid",
                crop_size=(480, 480),
                base_size=520,
                scale=(0.5, 2.0),
                workers=2,
            ),
            loss=LossConfig(aux_weight=0.5),
            optim=OptimConfig(lr=0.02, weight_decay=1e-4, schedule="poly", poly_power=0.9),
            train=TrainConfig(batch_size=32, epochs=30, eval_batch_size=1),
        ),
        source="torchvision's references/segmentation; there trained on COCO with VOC's classes and ten times the "
        "learning rate for the auxiliary head, here on SBD with one learning rate",
        score="60.5 mean IoU on COCO val with VOC's classes for fcn_resnet50, 63.7 for fcn_resnet101",
        needs="--data.dir ROOT",
    ),
    Recipe(
        "binary-bce",
        Config(
            run="runs/binary-bce",
            init="vgg16-imagenet",
            model=ModelConfig(name="fcns_ladder"),
            data=DataConfig(train="folder/train", val="folder/val", input_size=(160, 160), flip=False),
            loss=LossConfig(kind="sigmoid"),
            optim=OptimConfig(lr=1e-2, momentum=0.7, weight_decay=0.0),
            train=TrainConfig(batch_size=4, epochs=100, keep_every=5, pictures_every=20),
        ),
        source="gaussian37's notes: sigmoid BCE averaged over pixels and classes, checkpoints every 5 epochs, pictures "
        "every 20 steps; argmax, where their text has argmin; they give no batch and image size, so these are ours",
        score="none reported",
        needs="--data.dir FOLDER",
    ),
    Recipe(
        "scratch-fcn1",
        Config(
            run="runs/scratch-fcn1",
            model=ModelConfig(name="fcns_ladder", encoder="vgg13"),
            data=DataConfig(train="folder/train", val="folder/val", input_size=(224, 224)),
            optim=OptimConfig(lr=1e-2, momentum=0.9, weight_decay=5e-4, schedule="poly"),
            train=TrainConfig(batch_size=8, epochs=100),
        ),
        source="the FCN1 notes: the network and its 224x224 input, from scratch; they give no optimiser",
        score="none reported",
        needs="--data.dir FOLDER",
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}
"""Every recipe by name."""
