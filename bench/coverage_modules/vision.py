"""Image nets on the handwritten digits that scikit-learn ships: classification, segmentation, augmentation, contrast."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.coverage_modules.case import Case, Subject


def digits(size: int, channels: int = 1, batch: int = 16, n: int = 8) -> list[tuple[Tensor, Tensor]]:
    """``n`` pairs of images ``[batch, channels, size, size]`` and their digit ``[batch]``."""
    from sklearn.datasets import load_digits

    images, target = load_digits(return_X_y=True)
    x = torch.tensor(images[: batch * n], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    x = F.interpolate(x, size=(size, size), mode="bilinear").expand(-1, channels, -1, -1).contiguous()
    return list(zip(x.split(batch), torch.tensor(target[: batch * n]).split(batch), strict=True))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _timm(name: str, size: int, **settings: Any) -> Subject:
    import timm

    net = timm.create_model(name, pretrained=False, num_classes=10, in_chans=1, **settings)
    return Subject(module=net, batches=digits(size), loss=classify, optimizer=adamw)


def _torchvision(name: str, size: int) -> Subject:
    from torchvision import models

    return Subject(module=getattr(models, name)(num_classes=10), batches=digits(size, 3, 8), loss=classify, optimizer=sgd)


def _smp() -> Subject:
    import segmentation_models_pytorch as smp

    net = smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=1)
    dice = smp.losses.DiceLoss(mode="binary")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return dice(model(batch[0]), batch[1])

    return Subject(module=net, batches=[(x, (x > 0.5).float()) for x, _ in digits(32, 1, 4)], loss=loss, optimizer=adamw)


def _monai() -> Subject:
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet

    net = UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
    dice = DiceCELoss(to_onehot_y=True, softmax=True)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return dice(model(batch[0]), batch[1])

    return Subject(module=net, batches=[(x, (x > 0.5).float()) for x, _ in digits(32, 1, 4)], loss=loss, optimizer=adamw)


def _kornia() -> Subject:
    import kornia.augmentation as augment
    from torchvision.models import squeezenet1_1

    changes = augment.AugmentationSequential(
        augment.RandomHorizontalFlip(), augment.RandomAffine(15.0), augment.ColorJitter(0.1, 0.1, 0.1, 0.1)
    )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            x = changes(batch[0])
        return F.cross_entropy(model(x), batch[1])

    return Subject(module=squeezenet1_1(num_classes=10), batches=digits(32, 3, 8), loss=loss, optimizer=adamw)


def _vit_pytorch() -> Subject:
    from vit_pytorch import ViT

    net = ViT(image_size=16, patch_size=4, num_classes=10, dim=64, depth=3, heads=4, mlp_dim=128, channels=1, dropout=0.1, emb_dropout=0.1)
    return Subject(module=net, batches=digits(16, 1, 32), loss=classify, optimizer=adamw)


def _small_resnet() -> nn.Module:
    """Images ``[b, 3, h, w]`` to ``[b, 64]``."""
    from lightly.models import ResNetGenerator

    return nn.Sequential(*list(ResNetGenerator("resnet-9", 0.125).children())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _lightly_embedding() -> Subject:
    from lightly.embedding import SelfSupervisedEmbedding
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    class TwoViews(nn.Module):
        """Backbone and head, as the class's documentation wants its ``model``."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = _small_resnet(), SimCLRProjectionHead(64, 64, 32)

        def forward(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(self.backbone(x0)), self.head(self.backbone(x1))

    net = TwoViews()
    module: Any = SelfSupervisedEmbedding(net, NTXentLoss(), torch.optim.SGD(net.parameters(), lr=0.0005), None)
    batches = [((x + 0.1 * torch.randn_like(x), x.flip(-1)), y, ["a"] * len(y)) for x, y in digits(16, 3, 16)]
    return Subject(module=module, batches=batches)


def _lightly_byol() -> Subject:
    import copy

    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    net = nn.ModuleDict({"backbone": _small_resnet(), "head": BYOLProjectionHead(64, 64, 32), "predict": BYOLPredictionHead(32, 64, 32)})
    net["slow"], net["slow_head"] = copy.deepcopy(net["backbone"]), copy.deepcopy(net["head"])
    deactivate_requires_grad(net["slow"])
    deactivate_requires_grad(net["slow_head"])
    near = NegativeCosineSimilarity()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        m: Any = model
        update_momentum(m["backbone"], m["slow"], 0.99)
        update_momentum(m["head"], m["slow_head"], 0.99)
        one, two = batch[0], batch[0].flip(-1)
        p = [m["predict"](m["head"](m["backbone"](x))) for x in (one, two)]
        with torch.no_grad():
            z = [m["slow_head"](m["slow"](x)) for x in (one, two)]
        return 0.5 * (near(p[0], z[1]) + near(p[1], z[0]))

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.001)

    return Subject(module=net, batches=digits(16, 3, 16), loss=loss, optimizer=optimizer)


CASES = (
    Case(name="timm-resnet10t", needs=("timm", "sklearn"), make=lambda: _timm("resnet10t", 32)),
    Case(
        name="timm-vit",
        needs=("timm", "sklearn"),
        make=lambda: _timm("vit_tiny_patch16_224", 32, img_size=32, patch_size=8, depth=3, drop_rate=0.1),
    ),
    Case(name="timm-convnext", needs=("timm", "sklearn"), make=lambda: _timm("convnext_atto", 32)),
    Case(name="torchvision-mobilenet", needs=("torchvision", "sklearn"), make=lambda: _torchvision("mobilenet_v3_small", 32)),
    Case(name="smp-unet-dice", needs=("segmentation_models_pytorch", "sklearn"), make=_smp),
    Case(name="monai-unet", needs=("monai", "sklearn"), make=_monai),
    Case(name="kornia-augmented", needs=("kornia", "torchvision", "sklearn"), make=_kornia),
    Case(name="vit-pytorch", needs=("vit_pytorch", "sklearn"), make=_vit_pytorch),
    Case(name="lightly-embedding", needs=("lightly", "sklearn"), make=_lightly_embedding),
    Case(name="lightly-byol", needs=("lightly", "sklearn"), make=_lightly_byol),
)
