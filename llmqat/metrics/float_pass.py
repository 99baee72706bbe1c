"""The float model's pass over the windows of a run: every row of the scoreboard is compared with this one."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from llmqat.data.chat import unstack
from llmqat.machine import return_freed_memory
from llmqat.metrics.forwards import Kept, ReferenceForwards
from llmqat.metrics.perplexity import Perplexity, Windows, compare, score
from llmqat.models.float_view import FloatCopy, FloatView
from llmqat.nn.context import check_sequence
from llmqat.quant.full_float32 import full_float32
from llmqat.team import ALONE, Team


class FloatPass:
    """Runs the float model over `data` once, and keeps what is below its output head.

    Logits are made again from that, a few tokens at a time, whenever a row is scored. Of a model whose head cannot run
    apart nothing is kept, since that would be its logits: it runs again for each row.

    Args:
        reference: gives the float model.
        data: the windows of the run.
        layers: names of the layers that are compared, too.
        team: processes that score together, each its share of the batches. What they keep goes to the first, too.

    Attributes:
        reference: the same float model as it can be had now: what was a model of its own may since be inside a prepared
            one.
        team: `ALONE` once the first process scores without the others.
    """

    def __init__(
        self, reference: FloatCopy | FloatView, data: Windows, layers: Iterable[str] = (), team: Team = ALONE
    ) -> None:
        self.reference, self.data, self.layers, self.team = reference, data, tuple(layers), team
        self.kept: dict[int, Kept] = {}
        if not all(team.all_of(self._run())):
            self.kept = {}
            return
        for index in range(len(data.parts())):
            kept = team.on_first(self.kept.get(index), team.owner(index))
            if kept is not None:
                self.kept[index] = kept

    @torch.no_grad()
    @full_float32()
    def _run(self) -> bool:
        """Keep the share of this process; returns whether the head of the model runs apart."""
        forwards, shape = ReferenceForwards(self.reference, self.layers), self.data.ids.shape
        rows = sum(map(len, self.team.share(self.data.parts())))
        memory, done = torch.empty(0), 0
        for index, batch in self.data.batches("float model", self.team):
            ids, _ = unstack(batch.to(forwards.device))
            check_sequence(forwards.model, ids)
            below, outputs = forwards.of(index, ids)
            if forwards.head.layer is None:
                return False
            if not self.kept:  # one piece of memory for all windows, see `Room`
                memory = torch.empty(rows, shape[-1], below.hidden.shape[-1], dtype=below.hidden.dtype)
            hidden = memory[done : done + len(ids), : ids.shape[1]].copy_(below.hidden)
            done += len(ids)
            sampled = {name: rows.cpu() for name, rows in outputs.items() if name != forwards.head_name}
            self.kept[index] = Kept(hidden, below.vocabulary, sampled)
        return True

    def score(self, description: str) -> Perplexity:
        """Perplexity of the float model itself, by all of the team."""
        found = score(self._forwards(), self.data, None, description, self.team)
        return_freed_memory()
        return found

    def compare(self, model: nn.Module, description: str, watch: bool = True) -> Perplexity:
        """Perplexity of `model`, and its distance from the float model; also that of its layers unless `watch` is
        False."""
        layers = self.layers if watch else ()
        found = compare(model, self.data, self._forwards(), description, layers, self.team)
        return_freed_memory()
        return found

    def compared_with(self) -> nn.Module:
        """The part of the float model that runs when a row is compared: its output head, or where nothing is kept all
        of it."""
        head = self._forwards().head.layer
        return self.reference.model if head is None or not self.kept else head

    def _forwards(self) -> ReferenceForwards:
        # Made for each row: training may have given the model another head since, or taken it to another device.
        return ReferenceForwards(self.reference, self.layers, self.kept)


class FloatPasses:
    """Float passes over the test text of a run, and over other texts: a row of the scoreboard is scored on all of them.

    Args:
        reference: gives the float model.
        data: the windows of the run.
        also: those of other texts, by name.
        layers: names of the layers that are compared, on the windows of the run.
        team: as of `FloatPass`.
    """

    def __init__(
        self,
        reference: FloatCopy | FloatView,
        data: Windows,
        also: Mapping[str, Windows],
        layers: Iterable[str] = (),
        team: Team = ALONE,
    ) -> None:
        self.main = FloatPass(reference, data, layers, team)
        self.others = {name: FloatPass(reference, windows, (), team) for name, windows in also.items()}

    @property
    def reference(self) -> FloatCopy | FloatView:
        """The float model as it can be had now, see `FloatPass`."""
        return self.main.reference

    @reference.setter
    def reference(self, reference: FloatCopy | FloatView) -> None:
        for each in (self.main, *self.others.values()):
            each.reference = reference

    def score_alone(self) -> None:
        """Score in this process from now on, without the others of the team."""
        for each in (self.main, *self.others.values()):
            each.team = ALONE

    def compared_with(self) -> list[nn.Module]:
        """The parts of the float model that run when a row is compared."""
        return [each.compared_with() for each in (self.main, *self.others.values())]

    def score(self, description: str) -> Perplexity:
        """Perplexity of the float model itself."""
        also = {name: other.score(f"{description}, {name}") for name, other in self.others.items()}
        return replace(self.main.score(description), also=also or None)

    def compare(self, model: nn.Module, description: str, watch: bool = True) -> Perplexity:
        """Perplexity of `model` and its distance from the float model, see `FloatPass.compare`."""
        also = {name: other.compare(model, f"{description}, {name}") for name, other in self.others.items()}
        return replace(self.main.compare(model, description, watch), also=also or None)
