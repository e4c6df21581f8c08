"""The two updates of a training, and the guard that watches their losses."""

import torch

from ..method.losses import score_net_loss_and_grads, student_loss_and_grads


class Updates:
    """The two updates of a training, on networks that stay where they are in memory.

    student, score_net: engines (see `engine.py`); the teacher, the layers and the execution are the context's.
    Each method takes a `Batch` and a learning rate and returns (losses [B], k [B]).
    """

    def __init__(self, context, student, score_net):
        self._student, self._score_net, self._layers = student, score_net, context.layers
        # Parameters of these two want no gradient here, and what is compiled from them computes none.
        self._frozen_score_net, self._teacher = score_net.frozen(), context.execution.compiled(context.teacher)
        self._pull_back = context.execution.graphed(self._pull_back_student_loss)
        self._descend = score_net.graphed(self._update_score_net)

    def student(self, batch, lr):
        """One update of the student at states x_k.

        The gradient is taken in two stages, so that the networks never share a graph. The loss is pulled back through
        the score network and the teacher to x_{k-1} alone. What arrives there goes into the student's own backward.
        """
        log_gamma, all_losses = self._student.network.log_scaled_gamma, []
        for micro_batch in batch.split(self._student.accumulation):
            eps_hat = self._student.predict(micro_batch.x, self._layers.tau[micro_batch.k])
            x = self._layers.step(micro_batch.x, eps_hat, log_gamma, micro_batch.noise)  # x_{k-1}
            losses, grad_x, grad_log_gamma = self._pull_back(x.detach(), micro_batch.noise)
            self._student.backward([x, log_gamma], [grad_x, grad_log_gamma])
            all_losses.append(losses)
        self._student.step(lr)
        return torch.cat(all_losses), batch.k

    def score_net(self, batch, lr):
        """One update of the score network at states x_{k-1}."""
        self._score_net.prepare_step(lr)
        return self._descend(batch), batch.k

    def _pull_back_student_loss(self, x, noise):
        """Pull the student's loss back to x = x_{k-1} [B, *event], by input-only backward passes of both networks.

        Returns (losses [B], the loss's gradient at x, its direct gradient at log_gamma).
        """
        leaf, tau = x.detach().requires_grad_(True), self._layers.tau[noise.stream - 1]
        f, e = self._frozen_score_net(leaf, tau), self._teacher(leaf, tau)
        log_gamma = self._student.network.log_scaled_gamma.detach()
        losses, grad_f, grad_e, grad_log_gamma = student_loss_and_grads(
            f.detach(), e.detach(), self._layers, log_gamma, noise
        )
        (grad_x,) = torch.autograd.grad([f, e], leaf, [grad_f, grad_e])
        return losses, grad_x, grad_log_gamma

    def _update_score_net(self, batch):
        """The whole update: loss, backward, clipping, optimizer, average. Returns the losses [B] before it."""
        log_gamma, all_losses = self._student.network.log_scaled_gamma.detach(), []
        for micro_batch in batch.split(self._score_net.accumulation):
            f = self._score_net.predict(micro_batch.x, self._layers.tau[micro_batch.k - 1])
            losses, grad_f = score_net_loss_and_grads(f.detach(), self._layers, log_gamma, micro_batch.noise)
            self._score_net.backward([f], [grad_f])
            all_losses.append(losses)
        self._score_net.apply_step()
        return torch.cat(all_losses)


class FiniteGuard:
    """Remembers, on the device, the first update with a loss that is not finite; the host looks when it waits."""

    def __init__(self, context):
        self.world = context.world
        self.noted = torch.zeros(2, dtype=torch.int64, device=context.device)  # (step, layer); step 0: none

    def watch(self, losses, k, step):
        """Note the step and the highest layer with a bad loss, unless an earlier one is noted."""
        layer = torch.where(torch.isfinite(losses), 0, k).amax()
        found = torch.stack([torch.full_like(layer, step), layer])
        self.noted = torch.where((self.noted[0] == 0) & (layer > 0), found, self.noted)

    def check(self, folder):
        """Raise FloatingPointError, in one line, on every rank if anything was noted on one of them."""
        by_rank = self.world.gather(self.noted).tolist()
        bad = [(step, rank, layer) for rank, (step, layer) in enumerate(by_rank) if step]
        if not bad:
            return
        step, rank, layer = min(bad)
        saved = self.world.from_main(folder.checkpoints)
        where = f" on rank {rank}" if self.world.size > 1 else ""
        kept = "no checkpoint was saved before"
        advice = "try smaller learning rates in a new --outdir"
        if saved:
            kept = f"the last good checkpoint is {folder.checkpoint_path(saved[-1])}"
            advice += f", from there with init={folder.path}"
        elif step == 1:
            advice += ", or another teacher if this one's weights are damaged"
        raise FloatingPointError(f"the loss is not finite at step {step}, layer {layer}{where}; {kept}; {advice}")
