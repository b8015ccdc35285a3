"""What does an SAE compute? The JumpReLU SAE of this project, and the TopK SAE that it can load.

    sae = JumpReLUSAE.from_weights(safetensors.torch.load_file("sae.safetensors"))
    feature_acts = sae.encode(z)   # (B, d_sae); sae.decode(feature_acts) is z_hat (B, d_in)

Both map standardized activations z (B, d_in) to feature activations (B, d_sae) and back; the
analysis uses only `encode`, `decode`, `W_enc` and `W_dec`. Training is in MNIST_SAE_code.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class JumpReLUSAE(nn.Module):
    """JumpReLU SAE of standardized activations z (Rajamanoharan et al. 2024, arXiv 2407.14435).

        pre   = z W_enc + b_enc                 (B, d_sae)
        f     = pre * 1[pre > threshold]        (B, d_sae), threshold >= 0
        z_hat = f W_dec + b_dec                 (B, d_in), rows of W_dec of unit norm

    The same three lines run in training, in evaluation and in whatever loads the saved weights.
    Parameters: W_enc (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_in), b_dec (d_in,); buffer:
    threshold (d_sae,).
    """

    def __init__(self, d_in: int, d_sae: int):
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(d_sae))

    @classmethod
    def from_weights(
        cls, weights: dict[str, Tensor], device: torch.device | None = None
    ) -> JumpReLUSAE:
        """The frozen SAE with these tensors, by the names above; others in `weights` are ignored.

        It is on `device`, by default that of the tensors. Raises KeyError for a missing name,
        RuntimeError for a shape that does not fit.
        """
        sae = cls(*weights["W_enc"].shape)
        sae.load_state_dict({name: weights[name] for name in sae.state_dict()})
        return sae.to(device or weights["W_enc"].device).requires_grad_(False)

    def pre_activations(self, z: Tensor) -> Tensor:
        """pre (B, d_sae) of z (B, d_in)."""
        return torch.addmm(self.b_enc, z, self.W_enc)

    def jump(self, pre: Tensor) -> Tensor:
        """Feature activations (B, d_sae) of pre (B, d_sae); gradients flow where one is active."""
        # Compared into numbers: on CPUs four times faster than into booleans.
        active = torch.gt(pre.detach(), self.threshold, out=torch.empty_like(pre))
        return pre * active

    def encode(self, z: Tensor) -> Tensor:
        """Feature activations (B, d_sae) of z (B, d_in)."""
        return self.jump(self.pre_activations(z))

    def encode_feature(self, z: Tensor, k: int | Tensor) -> Tensor:
        """Activations (...) of feature k alone, of z (..., d_in); k may be one for each row (B,) of
        z (B, d_in) or (B, P, d_in)."""
        W_enc = self.W_enc.T[k]  # (d_in,) or (B, d_in)
        bias, threshold = self.b_enc[k], self.threshold[k]
        if W_enc.dim() == 1:
            pre = z @ W_enc + bias
        else:
            pre = torch.einsum("b...d,bd->b...", z, W_enc)
            each = (-1, *(1 for _ in pre.shape[1:]))  # one for each row
            bias, threshold = bias.view(each), threshold.view(each)
            pre = pre + bias
        return pre * (pre > threshold)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction z_hat (B, d_in) of feature_acts (B, d_sae)."""
        return torch.addmm(self.b_dec, feature_acts, self.W_dec)

    def forward(self, z: Tensor) -> Tensor:
        """Reconstruction z_hat (B, d_in) of z (B, d_in)."""
        return self.decode(self.encode(z))


class TopKSAE(JumpReLUSAE):
    """SAE whose k largest pre-activations are active, where they are positive (Gao et al. 2024)."""

    def __init__(self, d_in: int, d_sae: int, k: int):
        super().__init__(d_in, d_sae)
        self.k = k

    def jump(self, pre: Tensor) -> Tensor:
        """Feature activations (B, d_sae), at most k a row, of pre (B, d_sae)."""
        largest, place = pre.topk(self.k, dim=1)
        return torch.zeros_like(pre).scatter(1, place, largest.relu())

    def encode_feature(self, z: Tensor, k: int | Tensor) -> Tensor:
        """Activations (...) of feature k of z (..., d_in): whether it is active depends on all."""
        acts = self.encode(z.flatten(0, -2)).unflatten(0, z.shape[:-1])
        return acts.movedim(-1, 1)[torch.arange(len(z), device=z.device), k]


class PCACoordinates(NamedTuple):
    """Coordinates in which the SAE is trained: x = (z - mean) @ components / scale.

    A rotation changes neither the model nor its loss, but Adam scales each coordinate by itself. In
    principal components it can take larger steps along directions of little variance, which lowers
    FVU by about a tenth. Dividing by `scale` makes thresholds and lambda independent of the scale
    of z.
    """

    mean: Tensor  # (d_in,)
    components: Tensor  # (d_in, d_in), orthonormal columns, variance ascending
    scale: Tensor  # (), so that x has mean square 1

    @classmethod
    def fit(cls, z: Tensor) -> PCACoordinates:
        """The coordinates of z (N, d_in)."""
        mean = z.mean(0)
        centered = z - mean
        _, components = torch.linalg.eigh(centered.T @ centered)
        return cls(mean, components, centered.square().mean().sqrt())

    def transform(self, z: Tensor) -> Tensor:
        """x (N, d_in) of z (N, d_in)."""
        return (z - self.mean) @ self.components / self.scale

    def inverse_transform(self, x: Tensor) -> Tensor:
        """z (N, d_in) of x (N, d_in)."""
        return torch.addmm(self.mean, x, self.components.T * self.scale)

    @torch.no_grad()
    def sae_of_z(self, sae: JumpReLUSAE) -> JumpReLUSAE:
        """The SAE of x rewritten as an SAE of z: the same features, activations times `scale`."""
        out = JumpReLUSAE(*sae.W_enc.shape).to(sae.W_enc.device)
        out.W_enc.copy_(self.components @ sae.W_enc)
        out.b_enc.copy_(sae.b_enc * self.scale - self.mean @ out.W_enc)
        out.W_dec.copy_(sae.W_dec @ self.components.T)  # a rotation: rows keep their unit norm
        out.b_dec.copy_(self.inverse_transform(sae.b_dec[None])[0])
        out.threshold.copy_(sae.threshold * self.scale)
        return out.requires_grad_(False)
