"""The two losses of the minimax game, with their gradients in closed form (all from one pass over the tensors).

With g = f - e, sigma = sigma_{k-1} and z the noise that made x_{k-1}:

    loss_f   = (1/B) sum sigma^2 (f - z/gamma)^2                   denoising score matching (Vincent 2011)
    loss_phi = (1/B) sum sigma^2 (2 g (z/gamma - e) - g^2)         Fisher divergence in minimax form (HSIVI-SM)

The student's loss has a coefficient alpha, which is 1/2 above. In general

    loss_phi = (2/B) sum sigma^2 ((1 - alpha) g^2 + g (z/gamma - f))
             = (2/B) sum sigma^2 (g (z/gamma - e) - alpha g^2)

Score identity Distillation (Zhou et al. 2024, arXiv 2404.04057) has this form, and takes alpha from 1 to 1.2. Where the
score network is exact, f = E[z/gamma | x_{k-1}], its mean is 2 (1 - alpha) times the Fisher divergence. But its
gradient, which holds the networks fixed, is the divergence's own at alpha = 1/2 alone.
"""

import torch

from .. import ops


def score_net_loss_and_grads(f, layers, log_gamma, noise):
    """The score network's loss at x_{k-1}, given its f [B, *event]: (losses [B] whose mean is the loss, d loss / d f).

    noise: the `ops.Noise` that made x_{k-1}; its stream is the layer k of each sample.
    """
    return ops.denoising_loss_and_grads(f, layers.weight, layers.scale, layers.rows(log_gamma), noise)


def student_loss_and_grads(f, e, layers, log_gamma, noise, alpha=0.5):
    """The student's loss at x_{k-1}, given the score network's f and the teacher's e there, both [B, *event].

    Returns (losses [B] whose mean is the loss, d loss / d f, d loss / d e, the direct d loss / d log_gamma). With
    t = z/gamma, and each sample's share 1/B:

        d loss / d f = 2 sigma^2 (t - f + (1 - 2 alpha) g)         d loss / d log_gamma = sum of -2 sigma^2 g t
        d loss / d e = -2 sigma^2 (t - e + (1 - 2 alpha) g)

    What reaches the student and log_gamma through x_{k-1} comes on top, by pulling the first two back through the
    networks. noise: as of `score_net_loss_and_grads`. alpha: a float, the coefficient on top of this file.
    """
    losses, grad_f, grad_e, grad_rows = ops.fisher_loss_and_grads(
        f, e, layers.weight, layers.scale, layers.rows(log_gamma), noise, alpha
    )
    return losses, grad_f, grad_e, layers.pull_back_rows(log_gamma, grad_rows)


def path_likelihood_and_grads(eps_hat, target, layers, log_gamma, k):
    """How likely the layers are to take the steps of paths: the mean of -log N(x_{k-1}; mean of layer k, its noise).

    eps_hat, target: [B, dim], the student's prediction and the one that would give x_{k-1} as the mean; k: [B].
    Returns (losses [B] without their constant, the gradient of their mean at eps_hat, that at log_gamma).
    """
    rows = layers.rows(log_gamma)  # [1 or K, 1 or dim]
    of_sample = rows[k - 1] if layers.per_step else rows.expand(len(k), -1)
    deviation = of_sample + layers.c1[k].log()[:, None]  # log of the noise's, [B, 1 or dim]
    factor = (layers.b[k][:, None] / deviation.exp()).square()
    difference = eps_hat - target
    squares = factor * difference.square()  # [B, dim], 1 each in the mean where log_gamma fits
    losses = (squares / 2 + deviation).sum(1)
    of_rows = (1 - squares) / len(k)
    of_rows = of_rows if rows.shape[1] > 1 else of_rows.sum(1, keepdim=True)
    if layers.per_step:
        of_rows = torch.zeros_like(rows).index_add_(0, k - 1, of_rows)
    else:
        of_rows = of_rows.sum(0, keepdim=True)
    return losses, factor * difference / len(k), of_rows.reshape(log_gamma.shape)
