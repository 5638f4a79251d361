"""`tokenprune flops`: the cost of a strategy on a decoder of given sizes, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tokenprune.cli.commands.listing import Format
from tokenprune.cli.printing import say_json
from tokenprune.cli.shapes import decoder_spec

if TYPE_CHECKING:
    from tokenprune.core.ledger import Ledger
    from tokenprune.cost import DecoderSpec, Flops, KVBytes

Size = Optional[int]  # noqa: UP045 - typer reads annotations at run time, on Python 3.10 too


class Convention(str, Enum):
    """How FLOPs are counted; see `tokenprune.cost.count_flops`."""

    exact = "exact"
    fastv = "fastv"
    pdrop = "pdrop"


class Dtype(str, Enum):
    """Element type of the KV cache."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def command(
    context: typer.Context,
    shape: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--model-shape",
            help="7b, 13b, or a config.json (or its folder).",
            show_default="7b unless sizes are given",
        ),
    ] = None,
    image_tokens: Annotated[int, typer.Option(min=0, help="Image tokens of one prompt.")] = 576,
    text_tokens: Annotated[int, typer.Option(min=0, help="All other tokens of the prompt.")] = 36,
    strategy: Annotated[str, typer.Option(help="Name of a strategy.")] = "none",
    option: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("-o", "--option", metavar="KEY=VALUE", help="Option of the strategy; may be repeated."),
    ] = None,
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Equivalent image tokens as a share of all, in (0, 1]; solved for."),
    ] = None,
    convention: Annotated[Convention, typer.Option(help="How FLOPs are counted.")] = Convention.exact,
    logit_positions: Annotated[
        int, typer.Option(min=0, help="Positions that lm_head runs on (exact only); generation needs 1.")
    ] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Element type of the KV cache.")] = Dtype.float16,
    layers: Annotated[Size, typer.Option(help="Decoder layers.", rich_help_panel="Sizes")] = None,
    hidden: Annotated[Size, typer.Option(help="Width of a token's state.", rich_help_panel="Sizes")] = None,
    intermediate: Annotated[Size, typer.Option(help="Inner width of the MLP.", rich_help_panel="Sizes")] = None,
    heads: Annotated[Size, typer.Option(help="Query heads.", rich_help_panel="Sizes")] = None,
    kv_heads: Annotated[Size, typer.Option(help="Key and value heads.", rich_help_panel="Sizes")] = None,
    head_dim: Annotated[Size, typer.Option(help="Width of one head.", rich_help_panel="Sizes")] = None,
    vocab: Annotated[Size, typer.Option(help="Rows of lm_head.", rich_help_panel="Sizes")] = None,
    output: Annotated[Format, typer.Option("--format", help="A table, or one JSON object.")] = Format.table,
) -> None:
    """Show a strategy's tokens, FLOPs and KV cache per layer on a decoder of given sizes, without a model.

    Sizes alone describe a decoder, and are all needed; together with --model-shape they change the named one.
    """
    from tokenprune.api import strategy as make_strategy
    from tokenprune.cli.checks import refuse_given, strategy_request
    from tokenprune.core.stage import Shape
    from tokenprune.cost import ELEMENT_BYTES, count_flops, kv_bytes

    name, budget, options = strategy_request(strategy, option or [], budget)
    if convention is not Convention.exact:
        refuse_given(context, ["logit_positions"], f"with --convention {convention.value}, which leaves lm_head out")
    sizes = {
        "layers": layers,
        "hidden": hidden,
        "intermediate": intermediate,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab": vocab,
    }
    spec = decoder_spec(shape, {name: value for name, value in sizes.items() if value is not None})
    where = Shape(spec.layers, image_tokens, text_tokens)

    from tokenprune.core.scheduling.plan import declared_ledger

    chosen = make_strategy(name, budget, **options).bind(where)
    ledger = declared_ledger(chosen, where)
    found = _Account(
        repr(chosen),
        spec,
        ledger,
        count_flops(ledger, spec, convention.value, logit_positions=logit_positions),
        count_flops(ledger.unpruned(), spec, convention.value, logit_positions=logit_positions),
        kv_bytes(ledger, spec, ELEMENT_BYTES[dtype.value]),
        kv_bytes(ledger.unpruned(), spec, ELEMENT_BYTES[dtype.value]),
    )
    if output is Format.json:
        import json

        ran = chosen.options.model_dump(mode="json")
        head = {"strategy": name, "options": ran, "budget": budget, "sizes": spec.model_dump()}
        say_json(json.dumps({**head, **found.as_json(), "kv_dtype": dtype.value}, indent=2, ensure_ascii=False))
    else:
        found.print()


class _Account:
    """The output of the command."""

    def __init__(
        self,
        strategy: str,
        spec: DecoderSpec,
        ledger: Ledger,
        flops: Flops,
        flops_full: Flops,
        kv: KVBytes,
        kv_full: KVBytes,
    ) -> None:
        self.strategy, self.spec, self.ledger = strategy, spec, ledger
        self.flops, self.flops_full, self.kv, self.kv_full = flops, flops_full, kv, kv_full
        self.flops_ratio = flops.ratio(flops_full) if flops_full.total else 1.0
        self.kv_ratio = kv.total / kv_full.total if kv_full.total else 1.0

    def stages(self) -> Iterator[dict[str, Any]]:
        """Runs of layers with the same tokens."""
        entries = self.ledger.entries
        first = 0
        for layer in range(1, len(entries) + 1):
            if layer < len(entries) and entries[layer].image == entries[first].image:
                continue
            run = slice(first, layer)
            yield {
                "first_layer": first,
                "last_layer": layer - 1,
                "image_tokens": entries[first].image[0],
                "text_tokens": entries[first].other[0],
                "scored_rows": sum(entry.scored_rows for entry in entries[run]),
                "flops": sum(self.flops.by_layer[run]),
                "kv_bytes": sum(sum(rows) for rows in self.kv.by_layer[run]),
            }
            first = layer

    def as_json(self) -> dict[str, Any]:
        """Everything in plain numbers."""
        return {
            "convention": self.flops.convention,
            "stages": list(self.stages()),
            "layers": [
                {
                    "layer": entry.layer,
                    "image_tokens": entry.image[0],
                    "text_tokens": entry.other[0],
                    "scored_rows": entry.scored_rows,
                    "flops": flops,
                    "kv_bytes": sum(kv),
                }
                for entry, flops, kv in zip(self.ledger.entries, self.flops.by_layer, self.kv.by_layer, strict=True)
            ],
            "flops": self.flops.total,
            "flops_parts": self.flops.parts,
            "flops_per_layer": self.flops.per_layer,
            "flops_unpruned": self.flops_full.total,
            "flops_ratio": self.flops_ratio,
            "equivalent_tokens": self.ledger.equivalent_tokens,
            "equivalent_tokens_ratio": self.ledger.equivalent_tokens_ratio,
            "kv_bytes": self.kv.total,
            "kv_bytes_unpruned": self.kv_full.total,
            "kv_bytes_ratio": self.kv_ratio,
        }

    def print(self) -> None:
        """The stages as a Rich table, the totals below."""
        from rich.console import Console
        from rich.table import Table

        from tokenprune.utils.split_tables import Column, Parted

        flops, ledger, spec = self.flops, self.ledger, self.spec
        title = f"{self.strategy} on {spec.layers} layers of width {spec.hidden}"
        stages = list(self.stages())
        spans = [(stage["first_layer"], stage["last_layer"]) for stage in stages]
        layers = Column("layers", [str(first) if first == last else f"{first}–{last}" for first, last in spans])
        columns = [
            Column(name.replace("_", " "), [str(stage[name]) for stage in stages])
            for name in ("image_tokens", "text_tokens", "scored_rows")
        ]
        columns.append(Column("FLOPs", [_short(stage["flops"]) for stage in stages]))
        columns.append(Column("KV cache", [f"{_short(stage['kv_bytes'])}B" for stage in stages]))
        table = Parted(title, layers, [(columns, "")], justify="left")
        totals = Table(box=None, show_header=False)
        totals.add_column(style="bold")
        totals.add_column(justify="right")
        totals.add_column()
        share = f"{ledger.equivalent_tokens_ratio:.3f} of {ledger.image_tokens[0]}"
        totals.add_row("equivalent tokens", f"{ledger.equivalent_tokens:.1f}", share)
        for name, value in flops.parts.items():
            if value:
                totals.add_row(f"FLOPs, {name}", _short(value), "")
        shown = f"{self.flops_ratio:.3f} of {_short(self.flops_full.total)} unpruned, convention {flops.convention}"
        totals.add_row("FLOPs", _short(flops.total), shown)
        totals.add_row("FLOPs per layer", _short(flops.per_layer), "decoder only, mean")
        kv = f"{self.kv_ratio:.3f} of {_short(self.kv_full.total)}B unpruned"
        totals.add_row("KV cache", f"{_short(self.kv.total)}B", kv)
        console = Console()
        console.print(table)
        console.print(totals)


def _short(value: float) -> str:
    """A count with a decimal unit, three digits: 1234567 -> "1.23 M"."""
    if value < 1000:
        return f"{value:g} "
    for unit in ("k", "M", "G", "T", "P"):
        value /= 1000
        if value < 999.5 or unit == "P":
            break
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
