"""Language models: the contract of `model(tokens, state, reset)`, their sizes, and folders on disk."""

import errno
import json
import shutil

import pytest
import torch

from riverrun import state as states
from riverrun.config import to_dict
from riverrun.data.tokens import BPETokenizer, ByteTokenizer
from riverrun.mixers import MIXERS
from riverrun.models import folder
from riverrun.models.counts import count
from riverrun.models.language import LanguageConfig, LanguageModel
from riverrun.models.pattern import layers
from riverrun.testing.tolerance import close

SMALL = {"gated_deltanet": {"num_heads": 2}, "mamba": {"num_states": 4}}
LANGUAGE = [name for name, row in MIXERS.items() if row.causal and row.state != "none"]


def build(pattern="gated_deltanet + mamba", **sizes) -> LanguageModel:
    torch.manual_seed(0)
    names = set(layers(pattern, 8))
    given = {"vocabulary": 50, "width": 16, "depth": 2, **sizes}
    return LanguageModel(LanguageConfig(pattern=pattern, mixers={n: MIXERS[n].small for n in names}, **given))


def text(T, B=2):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(T))


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_mixer_makes_a_model_that_stops_and_goes_on(name):
    model, tokens = build(name).double(), text(23)
    with torch.no_grad():
        whole, _ = model(tokens)
        first, state = model(tokens[:, :9])
        then, state = model(tokens[:, 9:22], state)
        last, _ = model(tokens[:, 22:], state)
    close(torch.cat([first, then, last], 1), whole, "in three calls")


def test_reset_begins_a_document():
    model, tokens = build().double(), text(20)
    _, before = model(text(5))
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[:, 8] = True
    packed, _ = model(tokens, before, reset)
    close(packed[:, 8:], model(tokens[:, 8:])[0], "after the reset")
    close(packed[:, :8], model(tokens[:, :8], before)[0], "before the reset")


def test_gradients_reach_every_parameter_and_the_state():
    model = build()
    _, state = model(text(7))
    state = states.tree_map(lambda x: x.detach().requires_grad_(), state)
    logits, _ = model(text(9), state)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert all(x.grad is not None for x in states.leaves(state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32_logits(dtype):
    model = build().to(dtype)
    logits, _ = model(text(9))
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()


def test_tokens_need_not_be_contiguous():
    model, tokens = build(), text(18)
    close(model(tokens[:, ::2])[0], model(tokens[:, ::2].contiguous())[0], "a view", bound=0)


def test_the_pattern_repeats_to_the_depth():
    assert layers("2 mamba + gated_deltanet", 5) == ["mamba", "mamba", "gated_deltanet", "mamba", "mamba"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gated_delta_net", "did you mean 'gated_deltanet'"),
        ("0 mamba", "count of at least 1"),
        ("3 mamba gated_deltanet", "terms are joined by"),
        ("", "terms are joined by"),
        ("mamba + hydra", "sees the future"),
    ],
)
def test_a_wrong_pattern_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        layers(pattern, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LanguageConfig(50, mixers={"mamba": {}}), "'mamba', which is not in the pattern"),
        (LanguageConfig(50, mixers={"gated_deltanet": {"heads": 2}}), "did you mean 'num_heads'"),
        (LanguageConfig(50, depth=0), "at least 1 layer"),
        (LanguageConfig(0), "vocabulary"),
        (LanguageConfig(50, width=0), "width = 0"),
    ],
)
def test_a_wrong_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(config)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: m(text(9).int()), TypeError, "must be torch.int64"),
        (lambda m: m(text(9)[:, :0]), ValueError, "at least 1"),
        (lambda m: m(text(9)[0]), ValueError, r"must be \(B, T\)"),
        (lambda m: m(text(9) + 50), ValueError, "vocabulary is 0..49"),
        (lambda m: m(text(9) - 50), ValueError, "vocabulary is 0..49"),
        (lambda m: m(torch.full((2, 9), 50)), ValueError, "lie in 50..50"),
        (lambda m: m(text(9), None, torch.zeros(2, 9)), ValueError, r"^reset is torch\.float32"),
        (lambda m: m(text(9), None, torch.zeros(2, 8, dtype=torch.bool)), ValueError, "reset"),
        (lambda m: m(text(9), m(text(9, B=3))[1]), ValueError, "3 sequences, the tokens of 2"),
        (lambda m: m(text(9), build(depth=3)(text(9))[1]), ValueError, "another model's"),
        (lambda m: m(text(9), build(width=32)(text(9))[1]), ValueError, "another model's"),
        (lambda m: m(text(9), build("mamba + gated_deltanet")(text(9))[1]), ValueError, "another model's"),
        (lambda m: m(text(9), m(text(9))[1][0]), ValueError, "another model's"),
        (lambda m: m(text(9), (m(text(9))[1][0], m(text(9))[1][1][:1])), ValueError, "another model's"),
        (lambda m: m(text(9), torch.zeros(2, 4)), ValueError, "Tensor"),
    ],
)
def test_what_does_not_fit_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call(build())


def test_untrained_models_are_near_the_uniform_guess_and_stay_so_with_depth():
    for depth in (1, 12):
        torch.manual_seed(0)
        model = LanguageModel(LanguageConfig(50, width=64, depth=depth))
        with torch.no_grad():
            logits, _ = model(text(64))
            x, _ = model.blocks[-1](torch.randn(2, 64, 64), None, None)
        assert logits.std() < 0.5  # so the loss begins within 0.13 of log(50)
        assert x.std() < 1.5


def test_a_block_is_two_residual_layers():
    block, x = build().double().blocks[0], torch.randn(2, 9, 16, dtype=torch.float64)
    y, _ = block(x, None, None)
    middle = x + block.mixer(block.mixer_norm(x))[0]
    close(y, middle + block.mlp(block.mlp_norm(middle)), "block")


def test_maps_into_the_residual_stream_shrink_with_depth():
    shallow, deep = build(depth=2), build(depth=8)
    for a, b in ((m.blocks[0].mixer.out.weight, m.blocks[0].mlp.out.weight) for m in (shallow, deep)):
        assert a.std() > 0 and b.std() > 0
    for part in ("mixer", "mlp"):
        a, b = (getattr(m.blocks[0], part).out.weight.std() for m in (shallow, deep))
        assert 1.7 < a / b < 2.3, "the root of 8 / 2, within what a few hundred draws spread"


def test_an_untied_model_reads_its_own_output_map():
    model = build(tied=False)
    torch.nn.init.zeros_(model.head.weight)
    assert model.output is model.head.weight and (model(text(9))[0] == 0).all()
    assert build().output is not None and build().head is None


@pytest.mark.parametrize(("name", "each"), [("gated_deltanet", 4), ("attention", 2)])
def test_operations_are_two_a_weight_and_those_of_the_state(name, each):
    """Only matrices count, and the embedding once, as the output map it is tied to."""
    model = build(name)
    _, state = model(text(100, B=1))
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    numbers = sum(x.numel() for x in states.leaves(state) if x.is_floating_point())
    counts = count(model, T=100)
    assert counts.state_bytes == states.nbytes(state)
    assert abs(counts.forward_flops - 2 * weights - each * numbers) < 100  # a cache counts its positions too


def test_counts_are_those_of_the_model():
    model = build("gated_deltanet", tied=False)
    counts = count(model, T=100)
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    assert counts.embedding == 2 * 50 * 16
    _, state = model(text(10, B=1))
    assert counts.state_bytes == states.nbytes(state)
    assert counts.training_flops == 3 * counts.forward_flops
    # a matrix of weights is used once a token; what is not a matrix is less than a fifth of this small model
    assert 1.6 < counts.forward_flops / (counts.parameters - 50 * 16) < 3


@pytest.fixture
def saved(tmp_path):
    model = build(vocabulary=257)
    folder.save(tmp_path / "model", model, ByteTokenizer())
    return model, tmp_path / "model"


def test_a_saved_model_is_the_same_model(saved):
    model, path = saved
    restored, tokenizer = folder.load(path)
    assert restored.config == model.config and tokenizer.size == 257
    close(restored(text(9))[0], model(text(9))[0], "restored", bound=0)
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_half_precision_weights_keep_their_dtype(tmp_path):
    folder.save(tmp_path / "m", build(vocabulary=257).bfloat16(), ByteTokenizer())
    assert folder.load(tmp_path / "m")[0].embedding.weight.dtype == torch.bfloat16


def test_damaged_weights_are_refused(saved):
    _, path = saved
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        folder.load(path)
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        folder.load(path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        folder.load(path)


def change(path, edit):
    values = json.loads((path / "config.json").read_text())
    edit(values)
    (path / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v["model"].update(widht=3), "unknown field 'widht'; did you mean 'width'"),
        (lambda v: v["model"].pop("vocabulary"), "lacks the field 'vocabulary'"),
        (lambda v: v["model"].update(depth="two"), "depth is 'two'; it must be int"),
        (lambda v: v.pop("sha256"), "lacks the field 'sha256'"),
        (lambda v: v["model"].update(width=32), "does not hold the model"),
        (lambda v: v["model"].update(vocabulary=300), "do not belong together"),
        (lambda v: v["model"].update(pattern="gatd_deltanet"), "did you mean 'gated_deltanet'"),
    ],
)
def test_a_wrong_config_file_is_refused(saved, edit, message):
    _, path = saved
    change(path, edit)
    with pytest.raises(ValueError, match=message):
        folder.load(path)


def test_files_that_are_not_json_are_refused(saved):
    _, path = saved
    (path / "tokenizer.json").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        folder.load(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list; it must hold an object"):
        folder.load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        folder.load(path)


def test_another_tokenizer_is_refused(saved, tmp_path):
    model, path = saved
    bpe = BPETokenizer.train("the sea, the sea", 260)
    bpe.save(path / "tokenizer.json")
    with pytest.raises(ValueError, match="do not belong together"):
        folder.load(path)
    with pytest.raises(ValueError, match="do not belong together"):
        folder.save(tmp_path / "other", model, bpe)
    assert not (tmp_path / "other").exists()


def test_a_missing_model_is_named_with_one_that_is_there(saved):
    _, path = saved
    with pytest.raises(FileNotFoundError, match=f"there is one in {path}"):
        folder.load(path.parent)
    path.rename(path.with_name("step-1"))
    shutil.copytree(path.with_name("step-1"), path.with_name("step-2"))
    with pytest.raises(FileNotFoundError, match=r"there is one in .*step-2"):
        folder.load(path.parent)


def test_saving_again_leaves_one_folder_brought_to_the_disk(saved, monkeypatch):
    model, path = saved
    for end in ("new", "old"):  # what a killed run leaves
        (path.parent / f".model.{end}").mkdir()
    other, synced = build(vocabulary=257, depth=3), []
    weight = other.blocks[0].mlp.out.weight
    weight.data = weight.data.t().contiguous().t()  # strides are not what a file keeps
    monkeypatch.setattr(folder.os, "fsync", synced.append)
    folder.save(path, other, ByteTokenizer())
    assert [p.name for p in path.parent.iterdir()] == ["model"] and len(synced) == 4
    close(folder.load(path)[0](text(9))[0], other(text(9))[0], "saved again", bound=0)
    assert model.config != folder.load(path)[0].config


def test_a_full_disk_leaves_the_old_model(saved, monkeypatch):
    model, path = saved
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    write, calls = folder.write_bytes, []

    def full(file, data):
        calls.append(file)
        if len(calls) == 3:  # weights and tokenizer are written, the config is half written
            write(file, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(folder, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save(path, build(vocabulary=257).double(), ByteTokenizer())
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in path.parent.iterdir()] == ["model"]
    assert to_dict(folder.load(path)[0].config) == to_dict(model.config)
