"""A published file with one fault gives an error that names the key, and a field of its configuration to look at."""

import dataclasses
import random
import re
from typing import Any

import pytest
from published_cases import CASES, Case, every_case, mapped, ours
from published_keys import BF16, F32

from crocuta.checkpoints.files import TensorInfo
from crocuta.checkpoints.keymap import SHOWN
from crocuta.errors import WeightsFormatError


def config_fields(settings: dict[str, Any]) -> set[str]:
    nested = settings.get("layer", {})
    return settings.keys() | nested.keys()


def fields_of(error: WeightsFormatError) -> set[str]:
    """The fields of the configuration that a message says to look at."""
    return set(re.findall(r"\w+", str(error).partition("The fields that decide:")[2]))


FAULTS = ("missing", "reshaped", "transposed", "one layer less", "one layer more", "foreign", "untied")
FOREIGN = {
    "evo2": ("inner_mha_cls.Wqkv.bias", "projections.bias", "filter.short_filter_bias", "filter.log_poles", "filter.D"),
    "stripedhyena": ("inner_mha_cls.Wqkv.bias", "inner_mha_cls.out_proj.weight", "projections.weight", "filter.poles"),
    "evo1": ("inner_mha_cls.Wqkv.weight", "inner_mha_cls.out_proj.bias", "out_filter_dense.bias", "filter.D"),
    "hyenadna": (
        "mixer.filter_fn.implicit_filter.8.weight",
        "mixer.filter_fn.implicit_filter.6.bias",
        "mlp.fc3.weight",
    ),
}
"""What another layer, or a model of other settings, has."""


class Faulty:
    """The file of a case with one fault, the keys that a message must name, and a field that it must."""

    def __init__(self, case: Case, fault: str, dice: random.Random):
        self.found = case.found()
        self.wanted = ours(case.expected)[0]
        self.key_map = mapped(case.name)
        self.named: list[str] = []
        self.field: str | None = None
        weights = [n for n, s in case.stored.items() if s.kind == "weight"]
        layers = len(case.expected.blocks)
        match fault:
            case "missing":
                self.named = [dice.choice(weights)]
                del self.found[self.named[0]]
            case "reshaped":
                self._reshape(dice.choice([n for n, s in case.stored.items() if s.kind != "junk"]), dice)
            case "transposed":
                square = [n for n in weights if len(s := case.stored[n].shape) == 2 and s[0] != s[1]]
                name = dice.choice(square)
                self.found[name] = TensorInfo(self.found[name].dtype, self.found[name].shape[::-1])
                self.named = [name]
            case "one layer less":
                self.named = [n for n in weights if f"s.{layers - 1}." in n]
                for name in self.named:
                    del self.found[name]
                self.field = "n_layer" if case.family == "hyenadna" else "num_layers"
            case "one layer more":
                self.named = [n.replace("s.0.", f"s.{layers}.", 1) for n in weights if "s.0." in n]
                self.found |= {n: self.found[n.replace(f"s.{layers}.", "s.0.", 1)] for n in self.named}
                self.field = "n_layer" if case.family == "hyenadna" else "num_layers"
            case "foreign":
                self._add(case, dice)
            case "untied":
                self._untie(case)

    def _reshape(self, name: str, dice: random.Random) -> None:
        shape = list(self.found[name].shape)
        axis = dice.randrange(len(shape))
        match dice.choice(("longer", "shorter", "more axes")):
            case "longer":
                shape[axis] += dice.choice((1, 8))
            case "shorter" if shape[axis] > 1:
                shape[axis] -= 1
            case _:
                shape.insert(axis, 1)
        self.found[name] = TensorInfo(self.found[name].dtype, tuple(shape))
        self.named = [name]

    def _add(self, case: Case, dice: random.Random) -> None:
        suffix = dice.choice(FOREIGN[case.family])
        starts = sorted({m[0] for n in case.stored if (m := re.match(r".*?(blocks|layers)\.\d+\.", n))})
        free = [start + suffix for start in starts if start + suffix not in self.found]
        name = dice.choice(free)
        self.found[name] = TensorInfo(F32, (case.expected.hidden_size,))
        self.named = [name]

    def _untie(self, case: Case) -> None:
        """The configuration says untied; the file has no head."""
        config = dataclasses.replace(case.expected, tie_embeddings=False)
        self.key_map = case.mapped(config)
        shape = (config.vocab_size, config.hidden_size)
        self.wanted = self.wanted | {"head.weight": TensorInfo(BF16, shape)}
        self.named = [n for n in (entry.theirs for entry in self.key_map.entries if entry.ours == "head.weight")]
        self.found.pop(self.named[0], None)
        self.field = "tie_word_embeddings" if case.family == "hyenadna" else "tie_embeddings"


@pytest.mark.parametrize("seed", range(245))
def test_a_fault_is_named_with_a_field_of_the_configuration(seed: int) -> None:
    dice = random.Random(seed)
    case, fault = CASES[list(CASES)[seed % len(CASES)]], FAULTS[(seed + seed // len(CASES)) % len(FAULTS)]
    faulty = Faulty(case, fault, dice)
    with pytest.raises(WeightsFormatError) as caught:
        faulty.key_map.check(case.name, faulty.found, faulty.wanted)
    text = str(caught.value)
    assert faulty.named
    for name in sorted(faulty.named)[:SHOWN]:
        assert name in text
    fields = fields_of(caught.value)
    assert fields & config_fields(case.settings), (fault, text)
    assert faulty.field is None or faulty.field in fields, (fault, text)


def kinds_of_keys() -> dict[str, dict[str, str]]:
    """Family to name without numbers, to one key of a case that has it."""
    found: dict[str, dict[str, str]] = {}
    for name, case in CASES.items():
        for key, stored in case.stored.items():
            if stored.kind == "weight":
                found.setdefault(case.family, {}).setdefault(re.sub(r"\d+", "#", key), f"{name} {key}")
    return found


@pytest.mark.parametrize("family", FOREIGN)
def test_every_kind_of_key_has_a_field_that_decides_about_it(family: str) -> None:
    unexplained = []
    for place in kinds_of_keys()[family].values():
        name, key = place.split()
        found = CASES[name].found()
        del found[key]
        with pytest.raises(WeightsFormatError, match=f"1 missing: {re.escape(key)};") as caught:
            mapped(name).check(name, found, ours(CASES[name].expected)[0])
        if not fields_of(caught.value) & config_fields(CASES[name].settings):
            unexplained.append(key)
    assert unexplained == []


@every_case
def test_a_dtype_that_loses_what_is_wide_by_type_is_refused(name: str) -> None:
    case, dice = CASES[name], random.Random(name)
    wide = [
        n
        for n, s in case.stored.items()
        if s.kind == "weight" and n.endswith(("poles", "residues", "freq", "6.weight"))
    ]
    key = dice.choice([n for n in wide if not n.endswith("inv_freq")])
    found = case.found() | {key: TensorInfo(BF16, case.stored[key].shape)}
    with pytest.raises(WeightsFormatError, match=re.escape(f"of the wrong dtype: {key} is torch.bfloat16")):
        mapped(name).check(name, found, ours(case.expected)[0])
