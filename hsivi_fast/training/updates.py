"""The two updates of a training, and the guard that watches their losses."""

import torch

from ..method.class_labels import if_given
from ..method.losses import path_likelihood_and_grads, score_net_loss_and_grads, student_loss_and_grads
from .start import Anchor


class Updates:
    """The two updates of a training, on networks that stay where they are in memory.

    student, score_net: engines (see `engine.py`); the teacher, the layers and the execution are the context's.
    Each method takes a `Batch` and a learning rate and returns (losses [B], k [B]).
    `anchor`: how the start's regression is weighed (see start.py), or None.
    """

    def __init__(self, context, student, score_net):
        self._student, self._score_net = student, score_net
        self._layers, self._matching, self._alpha = context.layers, context.matching, context.objective.alpha
        self.anchor = Anchor(context) if context.objective.anchor else None
        # Parameters of these two want no gradient here, and what is compiled from them computes none.
        self._prepared_score_net = score_net.frozen().at(self._matching.t)
        self._frozen_score_net = context.execution.compiled(self._prepared_score_net)
        self._prepared_teacher = context.prepared_teacher.at(self._matching.t)
        self._teacher = context.execution.compiled(self._prepared_teacher)
        self._follow = student.graphed(self._update_student)
        self._pull_back = self._pull_back_student_loss
        if not student.records:  # otherwise it is recorded as a part of the update
            self._pull_back = context.execution.graphed(self._pull_back)
        self._descend = score_net.graphed(self._update_score_net)
        self._regress = student.graphed(self._update_student_on_paths)
        self._teacher_losses = context.execution.graphed(self._losses_of_teacher)

    def start(self, batch, lr):
        """One update of the student towards the teacher's paths, a `PathBatch`."""
        self._student.prepare_step(lr)
        return self._regress(batch), batch.k

    def student(self, batch, lr, anchored=None):
        """One update of the student at states x_k.

        The gradient is taken in two stages, so that the networks never share a graph. The loss is pulled back through
        the score network and the teacher to what the layer makes. What arrives there goes into the student's own
        backward, with the regression onto the states `anchored` (`PathBatch`), if there are some.
        """
        self._student.prepare_step(lr)
        losses = self._follow(batch, anchored)
        if anchored is not None:
            self.anchor.update()
        return losses, self._matching.layer[batch.noise.stream]

    def _update_student(self, batch, anchored):
        """The whole update, with what the score network is now. Returns the losses [B] before it."""
        self._prepared_score_net.refresh()
        log_gamma, all_losses = self._student.network.log_scaled_gamma, []
        parts = self._student.accumulation
        all_anchored = anchored.split(parts) if anchored is not None else [None] * parts
        for micro_batch, kept in zip(batch.split(parts), all_anchored, strict=True):
            times = self._layers.tau[self._matching.layer[micro_batch.noise.stream]]
            if kept is None:
                eps_hat = self._student.predict(micro_batch.x, times, *if_given(micro_batch.labels))
            else:  # one call: ZeRO-3 knows one forward to each backward
                inputs = torch.cat([micro_batch.x, kept.x]), torch.cat([times, self._layers.tau[kept.k]])
                labels = None if kept.labels is None else torch.cat([micro_batch.labels, kept.labels])
                of_both = self._student.predict(*inputs, *if_given(labels))
                eps_hat, eps_kept = of_both.split([len(micro_batch.x), len(kept.x)])
            x = self._matching.step(micro_batch.x, eps_hat, log_gamma, micro_batch.noise)  # x_{k-1}, or x_t
            losses, grad_x, grad_log_gamma = self._pull_back(x.detach(), micro_batch.noise, micro_batch.labels)
            outputs, gradients = [x, log_gamma], [grad_x, grad_log_gamma]
            if kept is not None:
                grad_kept = self._path_loss(eps_kept, kept)[1]
                b = self._matching.b[micro_batch.noise.stream].reshape(-1, *[1] * (x.ndim - 1))
                self.anchor.see(b * grad_x, grad_kept)
                outputs.append(eps_kept), gradients.append(self.anchor.scale() * grad_kept)
            self._student.backward(outputs, gradients)
            all_losses.append(losses)
        self._student.apply_step()
        return torch.cat(all_losses)

    def score_net(self, batch, lr):
        """One update of the score network at states that layers make."""
        self._score_net.prepare_step(lr)
        return self._descend(batch), self._matching.layer[batch.noise.stream]

    def teacher(self, batch):
        """The losses [B] that the teacher has in the place of the score network, and k [B]; nothing is updated."""
        return self._teacher_losses(batch), self._matching.layer[batch.noise.stream]

    @torch.no_grad()
    def fisher_divergences(self, states, scales):
        """What the score network measures of each layer k = 1 .. K: a list of floats.

        It is the mean of |f - e|^2 over coordinates and samples x_{k-1} of the layer, in squared scales of the density
        there: an estimate of the Fisher divergence from the student's density to the auxiliary one, and of the score
        network's own error. states: [x_0, ..., x_K], each [N, *event]; scales: [K + 1].
        """
        self._prepared_score_net.refresh()
        divergences = []
        for k, x in enumerate(states[:-1], start=1):
            t = torch.full((len(x),), k - 1, dtype=torch.int64, device=x.device)
            difference = self._prepared_score_net(x, t) - self._prepared_teacher(x, t)
            divergences.append(float(difference.square().mean()) * float(scales[k - 1]) ** 2)
        return divergences

    def _losses_of_teacher(self, batch):
        log_gamma = self._student.network.log_scaled_gamma.detach()
        with torch.no_grad():
            e = self._teacher(batch.x, self._matching.t[batch.noise.stream], *if_given(batch.labels))
        return score_net_loss_and_grads(e, self._matching, log_gamma, batch.noise)[0]

    def _update_student_on_paths(self, batch):
        """The whole update of a start. Returns the losses [B] before it."""
        all_losses, log_gamma = [], self._student.network.log_scaled_gamma
        for micro_batch in batch.split(self._student.accumulation):
            times = self._layers.tau[micro_batch.k]
            eps_hat = self._student.predict(micro_batch.x, times, *if_given(micro_batch.labels))
            losses, *gradients = self._path_loss(eps_hat, micro_batch)
            self._student.backward([eps_hat, log_gamma], gradients)
            all_losses.append(losses)
        self._student.apply_step()
        return torch.cat(all_losses)

    def _path_loss(self, eps_hat, batch):
        """(losses [B], the gradients of their mean at eps_hat and log_gamma) of a `PathBatch`.

        A teacher's path is one of DDIM without noise. A start on it leaves log_gamma where it is, with a gradient of
        zero, since DeepSpeed wants one of every parameter. A bridge's paths have the noise that layers shall have.
        """
        log_gamma = self._student.network.log_scaled_gamma.detach()
        if self._layers.ends_with_noise:
            return path_likelihood_and_grads(eps_hat.detach(), batch.target, self._layers, log_gamma, batch.k)
        return *_regression(eps_hat, batch.target), torch.zeros_like(log_gamma)

    def _pull_back_student_loss(self, x, noise, labels):
        """Pull the student's loss back to x [B, *event], which layers made, by input-only backward passes of both
        networks; labels: [B] or None.

        Returns (losses [B], the loss's gradient at x, its direct gradient at log_gamma).
        """
        leaf, t = x.detach().requires_grad_(True), self._matching.t[noise.stream]
        f, e = self._frozen_score_net(leaf, t, *if_given(labels)), self._teacher(leaf, t, *if_given(labels))
        log_gamma = self._student.network.log_scaled_gamma.detach()
        losses, grad_f, grad_e, grad_log_gamma = student_loss_and_grads(
            f.detach(), e.detach(), self._matching, log_gamma, noise, self._alpha
        )
        (grad_x,) = torch.autograd.grad([f, e], leaf, [grad_f, grad_e])
        return losses, grad_x, grad_log_gamma

    def _update_score_net(self, batch):
        """The whole update: loss, backward, clipping, optimizer, average. Returns the losses [B] before it."""
        log_gamma, all_losses = self._student.network.log_scaled_gamma.detach(), []
        for micro_batch in batch.split(self._score_net.accumulation):
            times = self._matching.t[micro_batch.noise.stream]
            f = self._score_net.predict(micro_batch.x, times, *if_given(micro_batch.labels))
            losses, grad_f = score_net_loss_and_grads(f.detach(), self._matching, log_gamma, micro_batch.noise)
            self._score_net.backward([f], [grad_f])
            all_losses.append(losses)
        self._score_net.apply_step()
        return torch.cat(all_losses)


def _regression(eps_hat, target):
    """(losses [B], the gradient of their mean at eps_hat) of |eps_hat - target|^2."""
    difference = eps_hat.detach() - target
    return difference.square().flatten(1).sum(1), difference * (2 / len(difference))


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
