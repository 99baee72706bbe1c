"""The float model's pass over the windows of a run: every row of the scoreboard is compared with this one."""

from collections.abc import Iterable

import torch
from torch import nn

from llmqat.data.chat import unstack
from llmqat.metrics.forwards import Kept, ReferenceForwards
from llmqat.metrics.perplexity import Perplexity, Windows, compare, score
from llmqat.models.float_view import FloatCopy, FloatView
from llmqat.nn.context import check_sequence


class FloatPass:
    """Runs the float model over `data` once, and keeps what is below its output head.

    Logits are made again from that, a few tokens at a time, whenever a row is scored. Of a model whose head cannot run
    apart nothing is kept, since that would be its logits: it runs again for each row.

    Args:
        reference: gives the float model.
        data: the windows of the run.
        layers: names of the layers that are compared, too.

    Attributes:
        reference: the same float model as it can be had now: what was a model of its own may since be inside a prepared
            one.
    """

    def __init__(self, reference: FloatCopy | FloatView, data: Windows, layers: Iterable[str] = ()) -> None:
        self.reference, self.data, self.layers = reference, data, tuple(layers)
        self.kept: list[Kept] = []
        self._run()

    @torch.no_grad()
    def _run(self) -> None:
        forwards, shape = ReferenceForwards(self.reference, self.layers), self.data.ids.shape
        memory, done = torch.empty(0), 0
        for index, batch in enumerate(self.data.batches("float model")):
            ids, _ = unstack(batch.to(forwards.device))
            check_sequence(forwards.model, ids)
            below, outputs = forwards.of(index, ids)
            if forwards.head.layer is None:
                return
            if not self.kept:  # one piece of memory for all windows, see `Room`
                memory = torch.empty(shape[0], shape[-1], below.hidden.shape[-1], dtype=below.hidden.dtype)
            hidden = memory[done : done + len(ids), : ids.shape[1]].copy_(below.hidden)
            done += len(ids)
            sampled = {name: rows.cpu() for name, rows in outputs.items() if name != forwards.head_name}
            self.kept.append(Kept(hidden, below.vocabulary, sampled))

    def score(self, description: str) -> Perplexity:
        """Perplexity of the float model itself."""
        return score(self._forwards(), self.data, description=description)

    def compare(self, model: nn.Module, description: str, watch: bool = True) -> Perplexity:
        """Perplexity of `model`, and its distance from the float model; also that of its layers unless `watch` is
        False."""
        return compare(model, self.data, self._forwards(), description, self.layers if watch else ())

    def _forwards(self) -> ReferenceForwards:
        # Made for each row: training may have given the model another head since, or taken it to another device.
        return ReferenceForwards(self.reference, self.layers, self.kept)
