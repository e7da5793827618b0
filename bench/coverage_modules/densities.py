"""Flows, Gaussian processes, diffusion and policies: distributions, log-determinants, sampled noise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.coverage_modules.case import Case, Subject
from bench.coverage_modules.lightning_own import words
from bench.coverage_modules.vision import adamw, digits


def _moons(n: int = 8) -> list[Tensor]:
    from sklearn.datasets import make_moons

    points, _ = make_moons(64 * n, noise=0.1, random_state=0)
    return list(torch.tensor(points, dtype=torch.float32).split(64))


def _nflows() -> Subject:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, MaskedPiecewiseRationalQuadraticAutoregressiveTransform, ReversePermutation

    layers: list[Any] = []
    for _ in range(3):
        layers += [ReversePermutation(2), MaskedPiecewiseRationalQuadraticAutoregressiveTransform(2, 16, tails="linear", tail_bound=3.0)]
    net = Flow(CompositeTransform(layers), StandardNormal([2]))
    return Subject(module=net, batches=_moons(), loss=lambda model, x: -model.log_prob(x).mean(), optimizer=adamw)


def _normflows() -> Subject:
    import normflows as nf

    flows: list[Any] = []
    for _ in range(4):
        flows += [nf.flows.AffineCouplingBlock(nf.nets.MLP([1, 32, 32, 2], init_zeros=True)), nf.flows.Permute(2, mode="swap")]
    net = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), flows)
    return Subject(module=net, batches=_moons(), loss=lambda model, x: model.forward_kld(x), optimizer=adamw)


def _sbi() -> Subject:
    from sbi.neural_nets import posterior_nn

    theta, x = torch.randn(512, 2), torch.randn(512, 4)
    x[:, :2] += theta
    net = posterior_nn(model="maf", hidden_features=16, num_transforms=2)(theta, x)
    batches = list(zip(theta.split(64), x.split(64), strict=True))
    return Subject(module=net, batches=batches, loss=lambda model, batch: model.loss(batch[0], condition=batch[1]).mean(), optimizer=adamw)


def _gpytorch() -> Subject:
    import gpytorch

    x = torch.linspace(0, 1, 60)
    y = torch.sin(6 * x) + 0.1 * torch.randn(60)

    class Exact(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean, self.kernel = gpytorch.means.ConstantMean(), gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, at: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(at), self.kernel(at))

    net = Exact()
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(net.likelihood, net)
    return Subject(module=net, batches=[(x, y)], loss=lambda model, batch: -evidence(model(batch[0]), batch[1]), optimizer=adamw)


def _diffusers() -> Subject:
    from diffusers import DDPMScheduler, UNet2DModel

    net = UNet2DModel(sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
                      down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    noising = DDPMScheduler(num_train_timesteps=100)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        noise, t = torch.randn_like(batch[0]), torch.randint(0, 100, (len(batch[0]),))
        return F.mse_loss(model(noising.add_noise(batch[0], noise, t), t, return_dict=False)[0], noise)

    return Subject(module=net, batches=digits(16, 1, 8), loss=loss, optimizer=adamw)


def _lucid_diffusion() -> Subject:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    net = GaussianDiffusion(Unet(dim=16, dim_mults=(1, 2), channels=1, flash_attn=False), image_size=16, timesteps=100)
    return Subject(module=net, batches=[x for x, _ in digits(16, 1, 8)], loss=lambda model, x: model(x), optimizer=adamw)


def _x_transformers() -> Subject:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    body = Decoder(dim=64, depth=2, heads=4, rotary_pos_emb=True, attn_dropout=0.1, ff_dropout=0.1)
    net = AutoregressiveWrapper(TransformerWrapper(num_tokens=200, max_seq_len=64, attn_layers=body))
    return Subject(module=net, batches=words(200, 8, (8, 33)), loss=lambda model, x: model(x), optimizer=adamw)


def _torchrl_ppo() -> Subject:
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import ClipPPOLoss

    body = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4), NormalParamExtractor())
    actor = ProbabilisticActor(TensorDictModule(body, ["observation"], ["loc", "scale"]), in_keys=["loc", "scale"],
                               distribution_class=TanhNormal, return_log_prob=True)  # fmt: skip
    value = ValueOperator(nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1)), in_keys=["observation"])
    net = ClipPPOLoss(actor, value)
    names = net.tensor_keys

    def batch() -> dict[str, Tensor]:
        with torch.no_grad():
            d = actor(TensorDict({"observation": torch.randn(64, 4)}, [64]))
        return {"observation": d["observation"], "action": d["action"], "log_prob": d[names.sample_log_prob],
                "advantage": torch.randn(64, 1), "target": torch.randn(64, 1)}  # fmt: skip

    def loss(model: nn.Module, b: Any) -> Tensor:
        given = {"observation": b["observation"], names.action: b["action"], names.sample_log_prob: b["log_prob"],
                 names.advantage: b["advantage"], names.value_target: b["target"]}  # fmt: skip
        out = model(TensorDict(given, [64]))
        return out["loss_objective"] + out["loss_critic"] + out["loss_entropy"]

    return Subject(module=net, batches=[batch() for _ in range(8)], loss=loss, optimizer=adamw)


def _tianshou() -> Subject:
    from tianshou.utils.net.common import Net
    from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic

    net = nn.ModuleDict({"actor": DiscreteActor(preprocess_net=Net(state_shape=4, hidden_sizes=[32, 32]), action_shape=2),
                         "critic": DiscreteCritic(preprocess_net=Net(state_shape=4, hidden_sizes=[32, 32]))})  # fmt: skip

    def loss(model: nn.Module, batch: Any) -> Tensor:
        m: Any = model
        chosen = torch.distributions.Categorical(probs=m["actor"](batch["obs"])[0])
        value = m["critic"](batch["obs"]).flatten()
        gain = (batch["returns"] - value).detach()
        return -(chosen.log_prob(batch["act"]) * gain).mean() + 0.5 * F.mse_loss(value, batch["returns"]) - 0.01 * chosen.entropy().mean()

    batches = [{"obs": torch.randn(64, 4), "act": torch.randint(0, 2, (64,)), "returns": torch.randn(64)} for _ in range(8)]
    return Subject(module=net, batches=batches, loss=loss, optimizer=adamw)


def _e3nn() -> Subject:
    from e3nn.nn.models.gate_points_2101 import Network

    net = Network(irreps_in="3x0e", irreps_hidden="8x0e + 4x1o", irreps_out="1x0e", irreps_node_attr="1x0e", irreps_edge_attr="0e + 1o",
                  layers=2, max_radius=1.5, number_of_basis=5, radial_layers=1, radial_neurons=16, num_neighbors=4.0,
                  num_nodes=20.0)  # fmt: skip
    batches = [
        {"pos": torch.rand(20, 3), "x": torch.randn(20, 3), "z": torch.ones(20, 1), "batch": torch.zeros(20, dtype=torch.long)}
        for _ in range(8)
    ]
    return Subject(module=net, batches=batches, loss=lambda model, b: (model(b) - 1).square().mean(), optimizer=adamw)


CASES = (
    Case(name="nflows-spline", needs=("nflows", "sklearn"), make=_nflows),
    Case(name="normflows-realnvp", needs=("normflows", "sklearn"), make=_normflows),
    Case(name="sbi-maf", needs=("sbi",), make=_sbi),
    Case(name="gpytorch-exact", needs=("gpytorch",), make=_gpytorch),
    Case(name="diffusers-unet", needs=("diffusers", "sklearn"), make=_diffusers),
    Case(name="lucid-diffusion", needs=("denoising_diffusion_pytorch", "sklearn"), make=_lucid_diffusion),
    Case(name="x-transformers", needs=("x_transformers",), make=_x_transformers),
    Case(name="torchrl-ppo", needs=("torchrl", "tensordict"), make=_torchrl_ppo),
    Case(name="tianshou-a2c", needs=("tianshou",), make=_tianshou),
    Case(name="e3nn-network", needs=("e3nn",), make=_e3nn),
)
