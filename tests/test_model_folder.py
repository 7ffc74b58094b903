"""Models as folders: what is read back, what is refused, and what stays when a write fails."""

import errno
import json
import shutil

import pytest
import torch
from small_models import build, text

from riverrun import disk
from riverrun.config import to_dict
from riverrun.data.tokens import BPETokenizer, ByteTokenizer
from riverrun.models import folder
from riverrun.testing.tolerance import close


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


def heads(values, number):
    values["model"]["mixers"]["gated_deltanet"] = {"num_heads": number}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v["model"].update(widht=3), "unknown field 'widht'; did you mean 'width'"),
        (lambda v: (v["model"].update(a=1), v.update(riverrun="99.0")), r"of riverrun 99\.0, this is 0"),
        (lambda v: v["model"].pop("vocabulary"), "lacks the field 'vocabulary'"),
        (lambda v: v["model"].update(depth="two"), "depth is 'two'; it must be int"),
        (lambda v: v["model"].update(depth=None), "depth is None; it must be int"),
        (lambda v: v["model"].update(depth=[2]), r"depth is \[2\]; it must be int"),
        (lambda v: v["model"].update(width=-16), r"config\.json: .*width is -16; it must be int, greater"),
        (lambda v: heads(v, "four"), r"config\.json: .*num_heads is 'four'; it must be int"),
        (lambda v: heads(v, None), r"config\.json: .*num_heads is None; it must be int"),
        (lambda v: heads(v, [2]), r"config\.json: .*num_heads is \[2\]; it must be int"),
        (lambda v: heads(v, -2), r"config\.json: .*num_heads is -2; it must be int, greater than 0"),
        (lambda v: v["model"].update(mixers=None), "mixers is None; it must be dict"),
        (lambda v: v.update(model=None), "model is None; it must be an object"),
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
    monkeypatch.setattr(disk.os, "fsync", synced.append)
    folder.save(path, other, ByteTokenizer())
    assert [p.name for p in path.parent.iterdir()] == ["model"] and len(synced) == 4
    close(folder.load(path)[0](text(9))[0], other(text(9))[0], "saved again", bound=0)
    assert model.config != folder.load(path)[0].config


def test_a_full_disk_leaves_the_old_model(saved, monkeypatch):
    model, path = saved
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    write, calls = disk.write, []

    def full(file, data):
        calls.append(file)
        if len(calls) == 3:  # weights and tokenizer are written, the config is half written
            write(file, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(disk, "write", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save(path, build(vocabulary=257).double(), ByteTokenizer())
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in path.parent.iterdir()] == ["model"]
    assert to_dict(folder.load(path)[0].config) == to_dict(model.config)
