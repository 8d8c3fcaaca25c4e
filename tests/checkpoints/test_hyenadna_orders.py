"""HyenaDNA of order 3 and above: the forward of both published codes, and the choice between them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hyenadna_orders import (
    IDS,
    LAYERS,
    LAYOUTS,
    LENGTH,
    SHIFTS,
    UNITS,
    WIDTH,
    Weights,
    checkpoint,
    published,
    settings,
    weights,
    write,
)
from published_folders import GOLDEN, LIGHTNING, PORT, expected, rewrite, setting
from torch import Tensor

import crocuta
from crocuta.checkpoints.convert import convert
from crocuta.checkpoints.load import load
from crocuta.config import (
    BandsConfig,
    BlockConfig,
    FixedWindowConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    LayerNormConfig,
    ModelConfig,
    OrderNHyenaConfig,
    PlainMLPConfig,
    SineConfig,
)
from crocuta.errors import ConfigError, InputError, WeightsFormatError

LAST = "model.backbone.layers.1.mixer.filter_fn.implicit_filter.6.weight"
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_order = pytest.mark.parametrize("order", [3, 4])


@torch.no_grad()
def logits(folder: Path, **options: Any) -> Tensor:
    return load(folder, **options)[0](IDS)


# --- what is computed ---


@every_order
@every_layout
def test_logits_are_those_of_the_published_forward(order, layout, tmp_path):
    folder = checkpoint(tmp_path / "a", order)
    wanted = published(weights(order), order, layout, SHIFTS[layout])
    assert wanted.abs().max() > 3
    found = logits(folder, filter_layout=layout, dtype=torch.float64)
    assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    assert (logits(folder, filter_layout=layout) - wanted).abs().max() <= 2e-4  # as in test_golden.py


@every_layout
def test_trained_features_and_names_of_checkpointed_layers(layout, tmp_path):
    def change(tensors: Weights) -> None:
        for layer in range(LAYERS):
            tensors[f"model.backbone.layers.{layer}.mixer.filter_fn.pos_emb.z"] = torch.rand(1, LENGTH, 5)

    tensors = weights(3)
    change(tensors)
    stored = {
        name.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer."): t for name, t in tensors.items()
    }
    folder = write(tmp_path / "a", settings(3), stored)
    wanted = published(tensors, 3, layout, SHIFTS[layout])
    found = logits(folder, filter_layout=layout, dtype=torch.float64)
    assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()


@every_order
def test_one_file_is_two_functions(order, tmp_path):
    folder = checkpoint(tmp_path / "a", order, shift=0.02)
    first, second = (logits(folder, filter_layout=layout, dtype=torch.float64) for layout in LAYOUTS)
    assert (first - second).abs().max() > 1e-3
    for layout, found in zip(LAYOUTS, (first, second), strict=True):
        wanted = published(weights(order), order, layout, 0.02)  # a shift that the file says is that of any code
        assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()


@every_layout
def test_the_configuration(layout, tmp_path):
    model, tokenizer = load(checkpoint(tmp_path / "a", 4, dropout=0.25), filter_layout=layout)
    mixer = OrderNHyenaConfig(
        filter=ImplicitFilterConfig(
            max_length=LENGTH,
            width=UNITS,
            positions=BandsConfig(features=5),
            activation=SineConfig(frequency=10.0),
            window=FixedWindowConfig(shift=SHIFTS[layout]),
            wide_positions=False,
        ),
        convolutions=3,
        gate_first=True,
        shared_filter=True,
        interleaved_windows=layout == "interleaved",
        short_bias=True,
        projection_bias=True,
        dropout=0.25,
    )
    block = BlockConfig(mixer=mixer, mlp=PlainMLPConfig(intermediate_size=2 * WIDTH), norm=LayerNormConfig())
    assert model.config == ModelConfig(
        vocab_size=16,
        hidden_size=WIDTH,
        blocks=(block,) * LAYERS,
        norm=LayerNormConfig(),
        tie_embeddings=True,
        embedding_dropout=0.1,
    )
    assert tokenizer is not None
    assert tokenizer.encode("ACGT").tolist() == [7, 8, 9, 10]


# --- the choice ---


@every_order
def test_without_a_choice_such_a_model_is_refused(order, tmp_path):
    with pytest.raises(ConfigError, match=r"filter_layout must be chosen .* two functions") as error:
        load(checkpoint(tmp_path / "a", order))
    assert all(f"'{layout}'" in str(error.value) for layout in LAYOUTS)
    assert f"order {order}" in str(error.value)


@pytest.mark.parametrize("choice", ["", "o d", 3])
def test_an_unknown_choice(choice, tmp_path):
    with pytest.raises(InputError, match=r"filter_layout is unknown: .*'interleaved' or 'by_convolution'"):
        load(checkpoint(tmp_path / "a", 3), filter_layout=choice)


@pytest.mark.parametrize("name", [LIGHTNING, PORT])
@every_layout
def test_for_order_2_the_choice_changes_nothing(name, layout, tmp_path):
    folder = GOLDEN / name
    if name == LIGHTNING:
        layer = {**json.loads((folder / "config.json").read_text())["layer"], "order": 2}
        folder = rewrite(name, tmp_path, config=setting(layer=layer))
    (model, _), (plain, _) = load(folder, filter_layout=layout), load(GOLDEN / name)
    assert model.config == plain.config
    assert all(isinstance(block.mixer, HyenaConfig) for block in model.config.blocks)
    tensors = expected(name)
    with torch.no_grad():
        found = model(tensors["input_ids"])
    assert torch.equal(found, plain(tensors["input_ids"]))
    assert (found - tensors["logits"]).abs().max() <= 2e-4


# --- what is refused ---


@pytest.mark.parametrize(
    ("order", "message"), [(1, "order: got 1; expected at least 2"), (33, "order"), ("3", "order")]
)
def test_impossible_orders(order, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path / "a", settings(order), weights(3)), filter_layout="interleaved")


def test_an_impossible_dropout(tmp_path):
    with pytest.raises(ConfigError, match="layer: dropout: got 1"):
        load(checkpoint(tmp_path / "a", 3, dropout=1), filter_layout="interleaved")


@every_layout
@pytest.mark.parametrize(("stored", "said"), [(3, 4), (4, 3), (2, 3), (3, 2)])
def test_weights_of_another_order_are_one_error(stored, said, layout, tmp_path):
    tensors = {name: t for name, t in weights(stored).items() if not name.endswith("deltas")}
    with pytest.raises(WeightsFormatError) as error:
        load(write(tmp_path / "a", settings(said), tensors), filter_layout=layout)
    text = str(error.value)
    for name, shape in (("in_proj.weight", [(stored + 1) * WIDTH, WIDTH]), ("filter_fn.bias", [(stored - 1) * WIDTH])):
        assert f"layers.1.mixer.{name} has shape {shape}" in text
    assert "implicit_filter.6.weight" in text
    assert "order" in text.split("The fields that decide: ")[1].split(", ")


@every_layout
def test_a_window_of_another_order(layout, tmp_path):
    with pytest.raises(
        WeightsFormatError, match=r"deltas is misshapen: got \[1, 1, 12\]; expected \[1, 1, 18\].*order"
    ):
        load(write(tmp_path / "a", settings(4), weights(3)), filter_layout=layout)


@every_layout
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: torch.cat([t, t[:1]]), "1 misshapen: .*6.weight.* has shape .7, 8., expected .6, 8."),
        (lambda t: t[:-1].clone(), "1 misshapen: .*6.weight.* has shape .5, 8., expected .6, 8."),
        (lambda t: t[:, :-1].clone(), "2 misshapen: "),
        (lambda t: t[0, 0].clone(), "2 misshapen: "),
        (lambda t: t.half(), "2 of the wrong dtype: "),
        (lambda t: t * float("nan"), r"implicit_filter.6.weight\[.* has NaN"),
    ],
)
def test_a_last_layer_that_cannot_be_divided(change, message, layout, tmp_path):
    folder = checkpoint(tmp_path / "a", 3, lambda tensors: tensors.update({LAST: change(tensors[LAST])}))
    with pytest.raises(WeightsFormatError, match=message):
        load(folder, filter_layout=layout)


def test_a_missing_last_layer(tmp_path):
    with pytest.raises(WeightsFormatError, match=r"2 missing: .*6.weight\[0::2\], .*6.weight\[1::2\]"):
        load(checkpoint(tmp_path / "a", 3, lambda tensors: tensors.pop(LAST)), filter_layout="interleaved")


def test_a_last_layer_stored_whole_and_in_parts(tmp_path):
    part = f"{LAST}[0::2]"
    folder = checkpoint(tmp_path / "a", 3, lambda tensors: tensors.update({part: tensors[LAST][0::2].clone()}))
    with pytest.raises(WeightsFormatError, match=r"hold both .*6.weight and .*6.weight\[0::2\]"):
        load(folder, filter_layout="interleaved")


# --- afterwards ---


@every_layout
def test_the_choice_is_saved_with_the_model_and_no_published_layout_holds_it(layout, tmp_path):
    folder = checkpoint(tmp_path / "a", 3)
    model, tokenizer = load(folder, filter_layout=layout)
    crocuta.save(model, tokenizer, tmp_path / "ours")
    assert torch.equal(logits(tmp_path / "ours"), logits(folder, filter_layout=layout))
    for target in ("hyenadna-hf", "evo2", "stripedhyena", "evo1-hf"):
        with pytest.raises(ConfigError, match=r"this model cannot be an? .* checkpoint"):
            convert(tmp_path / "ours", tmp_path / target, target)
        assert not (tmp_path / target).exists()
