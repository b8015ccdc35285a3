"""Sparse autoencoders: the JumpReLU SAE that this project trains, and the TopK SAE that it can read.

Both map standardized activations z (B, d_in) to feature activations (B, d_sae) and back; all analysis
uses only `encode`, `decode`, `W_enc` and `W_dec`. Training is in MNIST_SAE_code.py.
"""

from __future__ import annotations

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
    def from_weights(cls, weights: dict[str, Tensor]) -> JumpReLUSAE:
        """The SAE with these tensors, by the names above; others in `weights` are ignored.

        Raises KeyError for a missing name, RuntimeError for a shape that does not fit.
        """
        sae = cls(*weights["W_enc"].shape)
        sae.load_state_dict({name: weights[name] for name in sae.state_dict()})
        return sae.to(weights["W_enc"].device).requires_grad_(False)

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

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction z_hat (B, d_in) of feature_acts (B, d_sae)."""
        return torch.addmm(self.b_dec, feature_acts, self.W_dec)

    def forward(self, z: Tensor) -> Tensor:
        return self.decode(self.encode(z))


class TopKSAE(JumpReLUSAE):
    """SAE whose k largest pre-activations are active, where they are positive (Gao et al. 2024)."""

    def __init__(self, d_in: int, d_sae: int, k: int):
        super().__init__(d_in, d_sae)
        self.k = k

    def jump(self, pre: Tensor) -> Tensor:
        largest, place = pre.topk(self.k, dim=1)
        return torch.zeros_like(pre).scatter(1, place, largest.relu())
