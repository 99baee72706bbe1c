"""GPTQ for a whole model, block by block on the quantized prefix, each reconstructed behind it where that is asked for;
and the blocks of a run that was interrupted."""

from collections.abc import Collection
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from llmqat.algorithms.blocks import BlockInputs, Statistics, eval_mode, hessians_of, layers_of, passes_of
from llmqat.algorithms.blockwise import BlockError, Blockwise, Target, own_latents, reconstruct, regrouped
from llmqat.algorithms.compensation import take_latent
from llmqat.algorithms.gptq import check_hessian, gptq
from llmqat.algorithms.read_gains import read_gains
from llmqat.algorithms.stand_ins import StandIns, finding_parts
from llmqat.algorithms.whole_runs import WholeRuns
from llmqat.mapped import Disk
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.quantizers import disable_quantizers
from llmqat.progress import Meter, log
from llmqat.quant.affine import dequantize, on_grid
from llmqat.quant.full_float32 import full_float32
from llmqat.quant.grid import Compensation
from llmqat.team import ALONE, Team

HEAD = "output head"


class GptqSettings(NamedTuple):
    """How GPTQ treats every layer.

    Attributes:
        damp: damping of the Hessian, as a fraction of its mean diagonal.
        keep_float: leave `weight` as it was and keep GPTQ's change apart, so that the float model can still be run.
        kept_bytes: of one block's activations that may be kept between passes over the data; see `StandIns`.
        disk: where the change goes that is kept apart; None leaves it in memory.
        blockwise: how each block is reconstructed after GPTQ; None leaves it as GPTQ made it.
        whole: run the whole model for each block, since they do not run one after the other; see `WholeRuns`.
    """

    damp: float = 0.01
    keep_float: bool = False
    kept_bytes: int = 4 << 30
    disk: Disk | None = None
    blockwise: Blockwise | None = None
    whole: bool = False


class LayerError(NamedTuple):
    """Relative output error ``||(W - W_hat) X||^2 / ||W X||^2`` of one layer under both initializations; `gptq` is None
    where the layer saw too few calibration tokens, and round-to-nearest was kept."""

    layer: str
    rtn: float
    gptq: float | None


class BlockErrors(NamedTuple):
    """Errors of the layers of a block, or of a head; and of the whole block, where it was reconstructed."""

    layers: list[LayerError]
    block: BlockError | None = None


class Saved(Protocol):
    """Finished parts of a model by index, its blocks and behind them its head, from which an interrupted run goes on;
    e.g. `llmqat.train.checkpoint.SavedBlocks`."""

    def get(self, index: int) -> dict[str, Any] | None:
        """The values that `put` kept for a part, or None."""
        ...

    def holds(self, count: int) -> bool:
        """Whether so many parts are there, from the first on; nothing is read."""
        ...

    def put(self, index: int, state: dict[str, Any]) -> None:
        """Keep the state of a finished part."""
        ...


def output_power(weight: Tensor, H: Tensor) -> Tensor:
    """``||W X||^2``, up to a factor, from ``H`` alone."""
    return ((weight @ H) * weight).sum()


def _quantize_layer(layer: FakeQuantLinear, statistics: Statistics, settings: GptqSettings, name: str) -> LayerError:
    """Put GPTQ's grid and latents in place if the `statistics` are enough; return the errors of both ways."""
    weight, scheme, H = layer.weight.detach().to(layer.compute_dtype), layer.scheme, statistics.H
    check_hessian(H, name)
    power = output_power(weight, H).clamp(min=1e-30)
    rtn = float(output_power(weight - on_grid(weight, scheme, layer.storage_dtype), H) / power)
    if not statistics.enough:
        return LayerError(name, rtn, None)
    result = gptq(weight, H, scheme, layer.storage_dtype, settings.damp, name)
    w_hat = dequantize(result.codes, result.scale, result.zero_point, scheme)
    error = LayerError(name, rtn, float(output_power(weight - w_hat.float(), H) / power))
    layer.set_grid(result.scale, result.zero_point)
    take_latent(layer, result.latent, settings.keep_float)
    return error


def gptq_block(block: nn.Module, inputs: BlockInputs, settings: GptqSettings, name: str = "block") -> BlockErrors:
    """GPTQ for every `FakeQuantLinear` of one block, in place; then make its outputs the inputs of the next.

    Args:
        block: a prepared block.
        inputs: what it reads on the quantized prefix.
        settings: see `GptqSettings`.
        name: of the block, for messages.

    Raises:
        LlmqatError: if a Hessian cannot be used.
    """
    errors, stand_ins = _gptq_layers(block, inputs, settings, name)
    inputs.advance(block, stand_ins)
    return BlockErrors(errors)


def reconstructed_block(
    block: nn.Module, inputs: BlockInputs, target: Target, settings: GptqSettings, name: str = "block"
) -> BlockErrors:
    """GPTQ for every `FakeQuantLinear` of one block and then its reconstruction, in place; the `inputs` stay.

    Args:
        block: a prepared block.
        inputs: what it reads on the quantized prefix.
        target: what it is to return, a tensor per batch of `inputs`.
        settings: see `GptqSettings`.
        name: of the block, for messages.

    Raises:
        LlmqatError: if a Hessian cannot be used.
    """
    layers, error = list(layers_of(block).values()), None
    assert settings.blockwise is not None
    with own_latents(layers, settings.keep_float) as weights:
        errors, _ = _gptq_layers(block, inputs, settings._replace(keep_float=False), name)
        if layers:
            error = reconstruct(block, inputs, target, weights, settings.blockwise)
    return BlockErrors(errors, error)


def _gptq_layers(
    block: nn.Module, inputs: BlockInputs, settings: GptqSettings, name: str
) -> tuple[list[LayerError], StandIns]:
    """GPTQ for the layers of a block, in running order; returns their errors, and what is kept of their outputs."""
    errors: list[LayerError] = []
    layers = layers_of(block)
    with finding_parts(block) as parts:
        passes = passes_of(block, inputs, layers) if layers else []
    stand_ins = StandIns(block, parts, passes, settings.kept_bytes if inputs.in_a_row else 0)
    for stages in passes:
        # One Hessian serves all layers of a stage: they read the same tensor.
        statistics = hessians_of(block, inputs, {names[0]: layers[names[0]] for names in stages}, stand_ins)
        of_layer = {path: statistics[names[0]] for names in stages for path in names}
        # Counted on from stage to stage, most of which have one layer: else the first process had them all.
        owners = {path: inputs.team.owner(len(errors) + index) for index, path in enumerate(of_layer)}
        found = {
            path: _quantize_layer(layers[path], of_layer[path], settings, f"{name} {path}")
            for path, owner in owners.items()
            if owner == inputs.team.index
        }
        errors += _share_layers(layers, owners, found, settings, inputs.team)
    seen = {path for stages in passes for names in stages for path in names}
    errors += [LayerError(f"{name} {path}", 0.0, None) for path in layers if path not in seen]  # no token reaches them
    return errors, stand_ins


def _share_layers(
    layers: dict[str, FakeQuantLinear],
    owners: dict[str, int],
    found: dict[str, LayerError],
    settings: GptqSettings,
    team: Team,
) -> list[LayerError]:
    """Give every process the layers that their `owners` have quantized; returns the errors of all, each of which was
    `found` by one."""
    errors = {path: error for own in team.all_of(found) for path, error in own.items()}
    for path, owner in owners.items() if team.count > 1 else ():
        if errors[path].gptq is not None:
            layer = layers[path]
            own = list(written_state(layer, [""], settings.keep_float).items())
            layer.load_state_dict(dict(team.tensors_of(owner, own, layer.weight.device)), strict=False)
    return [errors[path] for path in owners]


@torch.no_grad()
def gptq_head(
    model: nn.Module, head: FakeQuantLinear, batches: list[Tensor], settings: GptqSettings, team: Team = ALONE
) -> LayerError:
    """GPTQ for the output head, in place, after the blocks: its Hessian is that of the final hidden states."""
    with eval_mode(model):
        statistics = hessians_of(model, WholeRuns.of(model, batches, team), {"": head})[""]
        return _quantize_layer(head, statistics, settings, HEAD)


@full_float32()
def gptq_model(
    model: nn.Module,
    blocks: nn.ModuleList,
    batches: list[Tensor],
    settings: GptqSettings,
    saved: Saved | None = None,
    head: FakeQuantLinear | None = None,
    team: Team = ALONE,
) -> list[LayerError]:
    """GPTQ for every `FakeQuantLinear` inside `blocks`, in place, then for the head; see `gptq_block`, `gptq_head`.

    Args:
        model: the prepared model; its float forward feeds the first block.
        blocks: its blocks, in order.
        batches: token ids ``(batch, length)``, all of one shape; nothing runs on them if all parts are saved.
        settings: see `GptqSettings`.
        saved: parts finished by an earlier run of the same arguments; those of this run are added.
        head: the output head, if GPTQ is to find its codes too.
        team: processes that divide the work, and all find the same; each has the whole model.

    Raises:
        LlmqatError: if there are no batches, or a Hessian cannot be used.
    """
    found = _gptq_blocks(model, blocks, batches, settings, saved, team)
    ratios = [errors.block.ratio for errors in found if errors.block is not None]
    if ratios:
        log(f"block-wise: output error of a block {fmean(ratios):.0%} of GPTQ's on average, {max(ratios):.0%} at most")
    if head is not None:
        own = restored(head, len(blocks), settings, saved)
        if own is None:
            own = BlockErrors([gptq_head(model, head, batches, settings, team)])
            keep(head, len(blocks), own, settings, saved)
        found.append(own)
    return [error for errors in found for error in errors.layers]


def _gptq_blocks(
    model: nn.Module,
    blocks: nn.ModuleList,
    batches: list[Tensor],
    settings: GptqSettings,
    saved: Saved | None,
    team: Team,
) -> list[BlockErrors]:
    """Quantize the blocks one after the other, but for those that are saved; arguments as of `gptq_model`."""
    if saved is not None and saved.holds(len(blocks)):
        found = (restored(block, index, settings, saved) for index, block in enumerate(blocks))
        whole = [errors for errors in found if errors is not None]
        if len(whole) == len(blocks):  # else another way of finding them left these
            return whole
    done, floats, gains, name = list[BlockErrors](), None, list[Tensor](), "GPTQ"
    with eval_mode(model):
        if settings.blockwise is not None:
            name, batches = "GPTQ and block-wise reconstruction", regrouped(batches, settings.blockwise.sequences)
            with disable_quantizers(model):
                floats = BlockInputs.capture(model, list(blocks), batches)
                gains = read_gains(model, list(blocks), batches[0])
        # A reconstruction is not divided: each process does all of it, and the first one counts.
        own_team = team if floats is None else ALONE
        if settings.whole:
            inputs: BlockInputs = WholeRuns.of(model, batches, own_team)
        else:
            inputs = BlockInputs.capture(model, list(blocks), batches, own_team)
        with Meter(name, len(blocks)) as meter:
            for index, block in enumerate(blocks):
                if floats is not None:  # before the float weights may be gone
                    with disable_quantizers(block):
                        floats.advance(block)
                own = restored(block, index, settings, saved)
                if own is not None:
                    inputs.advance(block)
                else:
                    target = None if floats is None else Target(floats.hidden, gains[index])
                    own = _quantized(block, inputs, target, settings, f"block {index}", team)
                    keep(block, index, own, settings, saved)
                done.append(own)
                error = own.block
                meter.update(index + 1, "" if error is None else f"output error {error.ratio:.0%} of GPTQ's")
    return done


def _quantized(
    block: nn.Module, inputs: BlockInputs, target: Target | None, settings: GptqSettings, name: str, team: Team
) -> BlockErrors:
    """Find the codes of a block, by GPTQ alone or with a reconstruction, the same in all processes of `team`; then make
    its outputs the inputs of the next."""
    if target is None:
        return gptq_block(block, inputs, settings, name)
    errors = reconstructed_block(block, inputs, target, settings, name)
    if team.count > 1:
        own = list(written_state(block, layers_of(block), settings.keep_float).items())
        block.load_state_dict(dict(team.tensors_of(0, own, inputs.hidden[0].device)), strict=False)
    inputs.advance(block)
    return team.all_of(errors)[0]


def restored(part: nn.Module, index: int, settings: GptqSettings, saved: Saved | None) -> BlockErrors | None:
    """Put what an earlier run found for a part of the model in place; the errors of its layers, or None for no such."""
    kept = None if saved is None else saved.get(index)
    if kept is None or kept.get("changed") != changed_tensors(settings.keep_float):
        return None
    part.load_state_dict(kept["state"], strict=False)
    stow(part, settings)
    block = kept.get("block")
    return BlockErrors([LayerError(*error) for error in kept["errors"]], None if block is None else BlockError(*block))


def keep(part: nn.Module, index: int, errors: BlockErrors, settings: GptqSettings, saved: Saved | None = None) -> None:
    """Save what GPTQ found for a part of the model, so that a later run may have it `restored`; then `stow` it."""
    if saved is not None:
        improved = {error.layer for error in errors.layers if error.gptq is not None}
        name = HEAD if isinstance(part, FakeQuantLinear) else f"block {index}"
        # The reconstruction has trained all of its layers.
        written = {p for p in layers_of(part) if errors.block is not None or f"{name} {p}".strip() in improved}
        state, rows = written_state(part, written, settings.keep_float), [tuple(error) for error in errors.layers]
        block = None if errors.block is None else tuple(errors.block)
        changed = changed_tensors(settings.keep_float)
        saved.put(index, {"state": state, "errors": rows, "block": block, "changed": changed})
    stow(part, settings)


def stow(part: nn.Module, settings: GptqSettings) -> None:
    """Put the change that is kept apart of each layer of a part on the disk, if there is one."""
    for layer in layers_of(part).values():
        if settings.disk is not None and layer.compensation is not None:
            multiples, step = layer.compensation
            layer.compensation = Compensation(settings.disk.put(multiples), step)


def changed_tensors(keep_float: bool) -> list[str]:
    """Names of the tensors of a layer that hold what GPTQ did to its weight."""
    return ["compensation_multiples", "compensation_step"] if keep_float else ["weight"]


def written_state(part: nn.Module, written: Collection[str], keep_float: bool) -> dict[str, Tensor]:
    """The tensors that GPTQ has set in the layers `written` of a part, by their names in its state dict.

    They are all that a later run needs to go on after that part.
    """
    tensors = ("scale", "zero_point", *changed_tensors(keep_float))
    names = {f"{path}.{tensor}".removeprefix(".") for path in written for tensor in tensors}
    return {name: tensor for name, tensor in part.state_dict().items() if name in names}
