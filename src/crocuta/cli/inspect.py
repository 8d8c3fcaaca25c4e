"""``crocuta inspect``: what a configuration is and costs, without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crocuta.cli.options import FilterLayout
from crocuta.errors import InputError

if TYPE_CHECKING:
    from crocuta.config import BackboneConfig

LENGTHS = (1024, 8192, 131_072, 1_048_576)


def inspect(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            help="Name of a preset or published model, config.json, or model folder; --kernels needs none.",
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option("--length", "-l", metavar="N", help="Tokens of a sequence; repeatable.  [default: 1k to 1M]"),
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Which kernels would run, and why not the others.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    filter_layout: FilterLayout = None,
) -> None:
    """Show a model's parts and what they cost, from its configuration alone.

    Parameters, operations (FLOPs) of training and of generation, bytes of weights and of the state of a sequence.
    """
    if target is None:
        if not kernels:
            raise InputError("nothing to inspect", expected="a TARGET, or --kernels alone for this machine")
        typer.echo(json.dumps(_machine(), indent=2) if as_json else render_kernels(_machine()))
        return
    config = read_target(target, filter_layout)
    report = describe(config, _lengths(config, length or ()))
    typer.echo(json.dumps(report, indent=2) if as_json else render(target, report, kernels=kernels))


def read_target(target: str, filter_layout: FilterLayout = None) -> BackboneConfig:
    """The configuration of a file, a folder or, where there is neither, a preset. Raises ConfigError and others."""
    from crocuta.config import EncoderConfig, ModelConfig
    from crocuta.presets import ENCODERS, encoder_preset, preset
    from crocuta.published import find_published

    path = Path(target)
    if path.exists() and not _is_ours(path):
        from crocuta.checkpoints.format import ReadOptions
        from crocuta.checkpoints.load import find_format

        contents = find_format(path).read(path, ReadOptions(filter_layout=filter_layout))
        contents.tensors.close()
        return contents.config
    if path.exists():
        from crocuta.checkpoints.native import read_config
        from crocuta.checkpoints.strict import read_small, strict_json
        from crocuta.errors import WeightsFormatError

        if path.is_file():
            try:
                value = strict_json(read_small(path, WeightsFormatError))
            except ValueError as error:
                raise WeightsFormatError(f"{path} is not strict JSON", given=error) from error
            if isinstance(value, dict) and "format" not in value:  # an architecture without a model's header
                return EncoderConfig.from_json(value) if "input" in value else ModelConfig.from_json(value)
        return read_config(path)
    published = find_published(target)
    if published is not None:
        return preset(published.preset)
    if "/" in target or target.endswith(".json"):
        raise InputError("no such file or folder", given=target, expected="a model, a config.json or a preset")
    return encoder_preset(target) if target in ENCODERS else preset(target)


def _is_ours(path: Path) -> bool:
    """A folder of ours, or a file that is no weights file, so JSON; all else may be a published layout."""
    from crocuta.checkpoints.native import NATIVE

    return ".pt" not in path.suffixes if path.is_file() else NATIVE.detect(path)


def _lengths(config: BackboneConfig, given: list[int] | tuple[int, ...]) -> list[int]:
    limit = config.max_length
    for length in given:
        if length < 1 or (limit is not None and length > limit):
            expected = "at least 1" if limit is None else f"1 to {limit}, what the filters are defined for"
            raise InputError("impossible length", given=length, expected=expected)
    if given:
        return sorted(set(given))
    if limit is None:
        return list(LENGTHS)
    return [*(length for length in LENGTHS if length < limit), limit]


def describe(config: BackboneConfig, lengths: list[int]) -> dict[str, Any]:
    """Every figure of the report, as JSON."""
    import dataclasses

    import torch

    from crocuta.model import count, flops

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    parts = count.parameters(config)
    return {
        "parameters": {"total": sum(parts.values()), **parts},
        "weight_bytes": {name: count.weight_bytes(config, dtype) for name, dtype in dtypes.items()},
        "blocks": [dataclasses.asdict(kind) for kind in count.block_kinds(config)],
        "causal": config.causal,
        "state_is_constant": config.causal and count.state_is_constant(config),
        "lengths": [
            {
                "length": length,
                "forward_flops": flops.forward_flops(config, length),
                "training_flops_per_token": flops.training_flops(config, length) / length,
                "prefill_flops_per_token": flops.forward_flops(config, length) / length,
                "decode_flops_per_token": flops.decode_flops(config, length) if config.causal else None,
                "state_bytes": {
                    name: count.state_bytes(config, length, dtype) if config.causal else None
                    for name, dtype in dtypes.items()
                },
            }
            for length in lengths
        ],
        "kernels": [kernel for length in dict.fromkeys([1, lengths[-1]]) for kernel in _kernels(config, length)],
        **_libraries(),
        "config": config.to_json(),
    }


def _compiled() -> str:
    """The instruction set that the compiled kernels of this machine run with, or why there are none."""
    from crocuta.ops.kernels.library import library, why_not

    opened = library()
    return f"none, {why_not()}" if opened is None else opened.isa


def _triton() -> str:
    """The GPU that the Triton kernels of this machine run on, or why they do not run."""
    import torch

    from crocuta.ops.kernels.gpu import why_not

    reason = why_not()
    return f"none, {reason}" if reason else torch.cuda.get_device_name()


def _machine() -> dict[str, Any]:
    """What every op would run with here, for one token and for many: the ops of presets that have them all."""
    from crocuta.presets import preset

    configs = [preset(name) for name in ("tiny-evo2", "tiny-modal", "tiny-hyenadna")]
    found = [kernel for length in (1, 8192) for config in configs for kernel in _kernels(config, length)]
    return {"kernels": list({json.dumps(kernel): kernel for kernel in found}.values()), **_libraries()}


def _libraries() -> dict[str, str]:
    from crocuta.ops.products import onednn_is_faster

    products = "oneDNN's, as MKL would not use AVX-512 here" if onednn_is_faster() else "torch's choice"
    return {"compiled": _compiled(), "products": products, "triton": _triton()}


def _kernels(config: BackboneConfig, length: int) -> list[dict[str, Any]]:
    from crocuta.model.flops import kernel_cases
    from crocuta.ops.dispatch import choose, reasons

    return [
        {"op": c.op, "taps": c.taps, "new_tokens": length, "kernel": choose(c).name, "reasons": reasons(c)}
        for c in kernel_cases(config, length)
    ]


# --- for people -----------------------------------------------------------------------------------------------


def render(title: str, report: dict[str, Any], *, kernels: bool) -> str:
    """The report as text."""
    config, weights = report["config"], report["weight_bytes"]
    head = (
        f"{title}: {_number(report['parameters']['total'])} parameters, {len(config['blocks'])} blocks of "
        f"{config['hidden_size']} channels, {_ends(config)}"
    )
    sections = [
        head,
        f"weights: {_bytes(weights['fp32'])} in fp32, {_bytes(weights['bf16'])} in bf16 (filters stay in fp32)",
        _parameter_table(report["parameters"]),
        _block_table(report["blocks"]),
        _length_table(report),
    ]
    if report["state_is_constant"]:
        sections.append("The state is the same for every length: nothing in this model grows with the text.")
    if kernels:
        sections.append(render_kernels(report))
    return "\n\n".join(sections)


def _ends(config: dict[str, Any]) -> str:
    """What goes in and what comes out."""
    if "input" not in config:
        return f"{config['vocab_size']} ids" + (", tied embeddings" if config["tie_embeddings"] else "")
    source = config["input"]
    given = f"{source['vocab_size']} ids" if source["type"] == "tokens" else f"{source['size']} features"
    pooling = f"{config['pooling']['type']} pooling" if config["pooling"] else "an output for every position"
    head = f", {config['head']['type']} head" if config["head"] else ""
    return f"an encoder of {given}, {pooling}{head}"


def _parameter_table(parameters: dict[str, int]) -> str:
    total = parameters["total"]
    rows = [[name, f"{number:,}", f"{number / total:.1%}"] for name, number in parameters.items()]
    return _table([["parameters", "", ""], *rows[1:], rows[0]])


def _block_table(blocks: list[dict[str, Any]]) -> str:
    rows = [["mixer", "MLP", "blocks", "parameters each", "layers"]]
    for kind in blocks:
        each = sum(kind[part] for part in ("mixer_parameters", "mlp_parameters", "norm_parameters"))
        rows.append([kind["mixer"], kind["mlp"], str(len(kind["layers"])), f"{each:,}", _ranges(kind["layers"])])
    return _table(rows, left={0, 1, 4})


def _length_table(report: dict[str, Any]) -> str:
    rows = [["tokens", "FLOPs a token: training", "prefill", "decode", "state fp32", "bf16"]]
    for entry in report["lengths"]:
        flops = [entry[f"{kind}_flops_per_token"] for kind in ("training", "prefill", "decode")]
        state = entry["state_bytes"]
        rows.append([f"{entry['length']:,}", *map(_number, flops), _bytes(state["fp32"]), _bytes(state["bf16"])])
    if not report["causal"]:
        return _table([row[:3] for row in rows], left=set()) + "\n\nThis model looks ahead: it cannot generate."
    return _table(rows, left=set())


def render_kernels(report: dict[str, Any]) -> str:
    """Which kernels run, and why not the others, as text."""
    lines = [
        _kernel_table(report["kernels"]) + "\n",
        f"Compiled kernels: {report['compiled']}.",
        f"Products of matrices in float32: {report['products']}.",
        f"Triton kernels: {report['triton']}.",
    ]
    return "\n".join(lines)


def _kernel_table(kernels: list[dict[str, Any]]) -> str:
    if not kernels:
        return "No op of this model has a choice of kernels."
    rows = [["op", "new tokens", "kernel", "why not another"]]
    for k in kernels:
        op = k["op"] + (f", {k['taps']:,} taps" if k["taps"] else "")
        refused = [reason for reason in k["reasons"] if not reason.endswith(": takes it")]
        rows.append([op, f"{k['new_tokens']:,}", k["kernel"], "; ".join(refused)])
    return _table(rows, left={0, 2, 3})


def _table(rows: list[list[str]], left: set[int] | None = None) -> str:
    """Aligned columns; those in ``left`` (the first by default) to the left, the others to the right."""
    sides = {0} if left is None else left
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = (
        "  ".join(f"{cell:<{w}}" if i in sides else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _ranges(layers: tuple[int, ...]) -> str:
    """0, 3, 6 to 8 as "0, 3, 6-8"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {letter}" if value < 999.5 * limit else f"{value / limit:,.0f} {letter}"
    return f"{value:.0f}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << shift:
            return f"{value / (1 << shift):.4g} {unit}"
    return f"{value} B"
