import argparse
import contextlib
import hashlib
import io
import json
import os
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ResNet, Vgg, lenet
from safetensors.torch import save_file, save_model
from torch import nn

from guard.errors import SuspectModelError, UnsafeWeightsError
from guard.suspect.checkpoints import load_weights
from guard.suspect.digest import weights_digest
from guard.suspect.model import SuspectModel
from guard.suspect.weights import check_weights_file, load_state_dict, read_weights


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return lenet().eval()


def refused(path, match="sandbox"):
    for read in (check_weights_file, load_state_dict):
        with pytest.raises(UnsafeWeightsError, match=match) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def save_zip(model, path):
    torch.save(model.state_dict(), path)


def save_legacy(model, path):
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)


def save_safetensors(model, path):
    save_file(model.state_dict(), path)


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_safetensors])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "weights"])
def test_load_state_dict_of_every_format_and_extension_gives_the_tensors(model, tmp_path, save, name):
    path = tmp_path / name
    save(model, path)

    check_weights_file(path)
    state = load_state_dict(path)

    assert sorted(state) == sorted(model.state_dict())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_load_state_dict_of_nested_checkpoint_unwraps_it(model, tmp_path, key, prefix):
    path = tmp_path / "checkpoint.pt"
    torch.save({"epoch": 3, key: {prefix + name: value for name, value in model.state_dict().items()}}, path)

    assert set(load_state_dict(path)) == set(model.state_dict())


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, {"weight": torch.ones(2), "epoch": 3}])
def test_load_state_dict_without_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")

    with pytest.raises(SuspectModelError, match=r"Save model.state_dict\(\)"):
        load_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_hostile_pickle_inside_torch_file_is_refused_and_does_not_run(tmp_path, legacy, nested):
    path, trace = tmp_path / "w.pt", tmp_path / "trace"
    content = {"weight": torch.ones(2), "x": Bomb(trace)} if nested else Bomb(trace)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)

    refused(path, "asks for (posix|nt)")

    assert not trace.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_plain_pickle_is_refused_and_does_not_run(tmp_path, protocol):
    path, trace = tmp_path / "w.pt", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Bomb(trace), protocol=protocol))

    refused(path)

    assert not trace.exists()


def test_hostile_numpy_pickle_is_refused_and_does_not_run(tmp_path):
    trace = tmp_path / "trace"
    bombs = np.array([Bomb(trace)], dtype=object)
    np.save(tmp_path / "w.npy", bombs, allow_pickle=True)
    np.savez(tmp_path / "w.npz", a=bombs)

    refused(tmp_path / "w.npy", "NumPy")
    refused(tmp_path / "w.npz", "NumPy")

    assert not trace.exists()


def test_hostile_tar_is_refused_and_does_not_run(tmp_path):
    path, trace = tmp_path / "w.pt", tmp_path / "trace"
    content = pickle.dumps(Bomb(trace))
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    refused(path, "tar archive")

    assert not trace.exists()


def test_hostile_second_pickle_in_zip_is_refused(model, tmp_path):
    path = tmp_path / "w.pt"
    for name, match in (("w/data.pkl", "twice"), ("w/other.pkl", "other.pkl"), ("v/data.pkl", "exactly one")):
        save_zip(model, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # zipfile warns of duplicate names
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(name, pickle.dumps(Bomb(tmp_path / "trace")))
        refused(path, match)


def test_whole_module_is_refused_with_its_class(model, tmp_path):
    torch.save(model, tmp_path / "w.pt")
    torch.save(model, tmp_path / "old.pt", _use_new_zipfile_serialization=False)

    refused(tmp_path / "w.pt", "whole module .*Sequential")
    refused(tmp_path / "old.pt", "whole module .*Sequential")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(model, tmp_path):
    torch.jit.script(model).save(str(tmp_path / "w.pt"))

    refused(tmp_path / "w.pt", "TorchScript")


@pytest.mark.filterwarnings("ignore")
def test_torch_export_archive_is_refused(model, tmp_path):
    exported = torch.export.export(model, (torch.zeros(2, 1, 28, 28),))
    torch.export.save(exported, str(tmp_path / "w.pt2"))
    (tmp_path / "w.pt2").rename(tmp_path / "w.pt")

    refused(tmp_path / "w.pt", "torch.export")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\x7fELF\x02\x01\x01" + bytes(64), "ELF"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:\x10", "ONNX"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"hello", "neither safetensors nor"),
    ],
)
def test_foreign_file_is_refused_by_its_content(tmp_path, content, match):
    (tmp_path / "w.safetensors").write_bytes(content)

    refused(tmp_path / "w.safetensors", match)


def test_model_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", "{}")

    refused(tmp_path / "w.mar", "model archive")


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_safetensors])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_file_is_refused_in_one_line(model, tmp_path, save, kept):
    path = tmp_path / "w"
    save(model, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])

    with pytest.raises(SuspectModelError, match="truncated or damaged") as caught:
        load_state_dict(path)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_file_are_refused(tmp_path):
    (tmp_path / "empty").touch()

    for name, match in (("absent", "cannot read"), ("empty", "is empty"), (".", "is a folder. .* joined first")):
        with pytest.raises(SuspectModelError, match=match):
            check_weights_file(tmp_path / name)


def test_index_of_weights_in_several_files_says_what_to_do(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"conv.weight": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(UnsafeWeightsError, match=r"JSON, .* joined first"):
        check_weights_file(index)


def test_weights_digest_is_the_same_for_module_and_every_file(model, tmp_path):
    expected = weights_digest(model)
    for save in (save_zip, save_legacy, save_safetensors):
        save(model, tmp_path / save.__name__)
        assert weights_digest(load_state_dict(tmp_path / save.__name__)) == expected

    assert weights_digest(model.to(memory_format=torch.channels_last)) == expected
    assert len(expected) == 64


def test_weights_digest_covers_parameters_buffers_names_and_dtypes():
    state = {name: tensor.clone() for name, tensor in Vgg().state_dict().items()}
    digests = {weights_digest(state)}
    for name in ("features.0.weight", "features.1.running_mean", "features.1.num_batches_tracked"):
        changed = {key: tensor.clone() for key, tensor in state.items()}
        changed[name].view(-1)[0] += 1
        digests.add(weights_digest(changed))
    digests.add(weights_digest({name: tensor.half() for name, tensor in state.items()}))
    digests.add(weights_digest({f"x{name}": tensor for name, tensor in state.items()}))

    assert len(digests) == 6


def test_weights_digest_of_known_tensors_equals_hand_computation():
    state = {"b": torch.tensor([1.0, 2.0, 3.0])[::2], "a": torch.tensor(7)}
    content = b"a\0torch.int64\0()\0" + (7).to_bytes(8, "little")
    content += b"b\0torch.float32\0(2,)\0" + np.array([1, 3], dtype="<f4").tobytes()

    assert weights_digest(state) == hashlib.sha256(content).hexdigest()


# --- small files that would become large


def archive_of(path: Path, pickled: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as packed:
        packed.writestr("archive/data.pkl", pickled)
        packed.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize("read", [check_weights_file, load_state_dict])
def test_bombs_are_refused_before_they_are_unpacked(tmp_path, read):
    bomb = b"\x80\x02c__builtin__\nbytearray\nJ" + (2**31 - 1).to_bytes(4, "little") + b"\x85R."
    for path in (
        archive_of(tmp_path / "sized.pt", bomb),
        archive_of(tmp_path / "builtins.pt", bomb.replace(b"__builtin__", b"builtins")),
        archive_of(tmp_path / "packed.pt", b"\x80\x02" + b"N0" * 2**22 + b"N.", zipfile.ZIP_DEFLATED),
        archive_of(tmp_path / "long.pt", b"\x80\x02" + b"N0" * 2**22 + b"N."),
    ):
        with pytest.raises(UnsafeWeightsError, match=r"bytearray|packed members|more than 8388608 bytes"):
            read(path)
    old = tmp_path / "old.pt"
    torch.save({"w": torch.zeros(2)}, old, _use_new_zipfile_serialization=False)
    old.write_bytes(old.read_bytes().replace(b"}q", b"c__builtin__\nbytearray\n0}q", 1) + b"c__builtin__\nbytearray\n")
    with pytest.raises(UnsafeWeightsError, match="bytearray"):
        read(old)


def test_tensor_larger_than_its_bytes_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(10**11)}, tmp_path / "wide.pt")
    with pytest.raises(SuspectModelError, match=r"'w' has shape \(100000000000,\), more than the 4 bytes"):
        load_state_dict(tmp_path / "wide.pt")
    shared = torch.arange(6.0)
    torch.save({"a": shared[:3], "b": shared.view(2, 3).t()}, tmp_path / "views.pt")  # views of one storage are fine
    assert load_state_dict(tmp_path / "views.pt")["b"].shape == (3, 2)


@pytest.mark.parametrize("kind", ["F6_E2M3", "F4", "F8_E8M0", "C64", "NOPE"])
def test_safetensors_of_unusual_types_load_or_are_refused_in_words(tmp_path, kind):
    header = json.dumps({"w": {"dtype": kind, "shape": [8], "data_offsets": [0, 64 if kind == "C64" else 6]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    for read in (check_weights_file, load_state_dict):
        with contextlib.suppress(SuspectModelError, UnsafeWeightsError):
            read(tmp_path / "w.safetensors")


# --- checkpoints as trainers write them


def vgg(seed=0):
    torch.manual_seed(seed)
    return Vgg().eval()


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def within(state, part, wrapper):
    return {name.replace(part, f"{part}{wrapper}."): tensor for name, tensor in state.items()}


CHECKPOINTS = {
    "flat, with numbers": lambda s: {**s, "epoch": 3, "classes": ["a"], "best": None, "best_acc1": torch.tensor(0.9)},
    "beside tensors": lambda s: {"state_dict": under("module.", s), "best_acc1": torch.tensor(97.1), "arch": "vgg"},
    "beside an optimizer": lambda s: {
        "net": s,
        "optimizer": {"state": {0: {"step": torch.tensor(4.0), "exp_avg": torch.ones(8, 3, 3, 3)}}, "param_groups": []},
        "history": [1, 2, {"loss": torch.ones(3)}],
        "scheduler": None,
    },
    "unusual key": lambda s: {"run": {"weights_after_epoch_7": s}},
    "list of dictionaries": lambda s: [{"epoch": 1}, {"network": s}],
    "compiled and distributed": lambda s: under("_orig_mod.module.", s),
    "distributed and compiled": lambda s: under("module._orig_mod.", s),
    "averaged": lambda s: {"n_averaged": torch.tensor(3), **under("module.", s)},
    "averaged in a Lightning module": lambda s: {"state_dict": {**under("ema.module.net.", s), "ema.n_averaged": 1}},
    "Lightning with a loss": lambda s: {"state_dict": {**under("model.", s), "criterion.weight": torch.ones(10)}},
    "one part compiled": lambda s: within(s, "classifier.", "_orig_mod"),
    "one part distributed": lambda s: under("model.", within(s, "features.", "module")),
    "one part behind a wrapper": lambda s: within(s, "classifier.", "net"),
    "profiled": lambda s: {**s, "total_ops": torch.zeros(1), "features.0.total_params": torch.zeros(1)},
    "same twice": lambda s: {"model": s, "state_dict": {name: tensor.clone() for name, tensor in s.items()}},
    "old batch norm": lambda s: {name: tensor for name, tensor in s.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_load_weights_finds_the_one_set_that_fits(tmp_path, name, legacy):
    saved, loaded = vgg(), vgg(seed=1)
    torch.save(CHECKPOINTS[name](saved.state_dict()), tmp_path / "w", _use_new_zipfile_serialization=not legacy)

    load_weights(loaded, tmp_path / "w")

    assert weights_digest(loaded) == weights_digest(saved)


def test_load_weights_of_an_architecture_with_names_like_wrappers_is_exact(tmp_path):
    def build():
        model = nn.Sequential()
        model.add_module("module", nn.Linear(3, 3))
        model.add_module("net", nn.Linear(3, 3))
        return model

    saved, loaded = build(), build()
    for content in (saved.state_dict(), under("module.", saved.state_dict()), {"net": saved.state_dict()}):
        torch.save(content, tmp_path / "w")
        load_weights(loaded, tmp_path / "w")
        assert weights_digest(loaded) == weights_digest(saved)


def test_load_weights_of_a_wrapper_takes_the_weights_of_the_network_inside(tmp_path):
    saved, wrapper = vgg(), nn.Sequential()
    wrapper.add_module("backbone", vgg(seed=1))
    torch.save(saved.state_dict(), tmp_path / "w")

    load_weights(wrapper, tmp_path / "w")

    assert weights_digest(wrapper.backbone) == weights_digest(saved)


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (lambda s, t: {"model": s, "model_ema": under("module.", t)}, ("model", "model_ema.module")),
        (
            lambda s, t: {"state_dict": {**under("model.", s), **under("ema.", t)}},
            ("state_dict.model", "state_dict.ema"),
        ),
        (lambda s, t: {**s, "best": t}, (".", "best")),
        (lambda s, t: [{"w": s}, {"w": t}], ("0.w", "1.w")),
    ],
)
def test_load_weights_of_several_sets_asks_and_takes_the_one_named(tmp_path, content, keys):
    saved = [vgg(1), vgg(2)]
    torch.save(content(*(model.state_dict() for model in saved)), tmp_path / "w")

    with pytest.raises(SuspectModelError, match="2 sets of tensors that fit") as caught:
        load_weights(vgg(), tmp_path / "w")
    assert all(repr(key) in str(caught.value) for key in keys)
    assert "--state-key" in str(caught.value)
    for key, model in zip(keys, saved, strict=True):
        loaded = vgg()
        load_weights(loaded, tmp_path / "w", state_key=key)
        assert weights_digest(loaded) == weights_digest(model)
    with pytest.raises(SuspectModelError, match=r"no tensors .* under the state key 'x'"):
        load_weights(vgg(), tmp_path / "w", state_key="x")


def test_load_weights_that_fit_nowhere_says_where_it_looked(tmp_path):
    state = vgg().state_dict()
    del state["classifier.3.bias"]
    torch.save({"state_dict": under("module.", state), "ema": {"a": torch.ones(1)}}, tmp_path / "w")

    with pytest.raises(SuspectModelError) as caught:
        load_weights(vgg(), tmp_path / "w")

    assert "nearest is 'state_dict.module'" in str(caught.value)
    assert "1 missing (classifier.3.bias)." in str(caught.value)
    assert "under 'state_dict.module', 'ema'" in str(caught.value)
    torch.save({"epoch": 3}, tmp_path / "w")
    with pytest.raises(SuspectModelError, match="must hold named tensors"):
        load_weights(vgg(), tmp_path / "w")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.decode.weight = self.encode.weight


@pytest.mark.parametrize("dropped", ["encode.weight", "decode.weight"])
def test_load_weights_of_tied_layers_needs_them_once(tmp_path, dropped):
    saved = Tied()
    save_model(saved, str(tmp_path / "a"))
    torch.save({name: tensor for name, tensor in saved.state_dict().items() if name != dropped}, tmp_path / "b")

    for name in ("a", "b"):
        loaded = Tied()
        load_weights(loaded, tmp_path / name)
        assert weights_digest(loaded) == weights_digest(saved)


def test_load_weights_of_lazy_layers_takes_the_shapes_of_the_file(tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)).eval()

    saved, loaded, images = build(), build(), torch.rand(2, 1, 8, 8)
    saved(images)
    torch.save({"state_dict": under("module.", saved.state_dict())}, tmp_path / "w")

    load_weights(loaded, tmp_path / "w")

    assert torch.equal(loaded(images), saved(images))


@pytest.mark.filterwarnings("ignore")
def test_load_weights_of_quantised_layers(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return torch.ao.quantization.quantize_dynamic(lenet(), {nn.Linear}, dtype=torch.qint8)

    saved, loaded, images = build(0), build(1), torch.rand(2, 1, 28, 28)
    torch.save({"state_dict": saved.state_dict()}, tmp_path / "w")

    load_weights(loaded, tmp_path / "w")

    assert torch.equal(loaded(images), saved(images))


def test_load_weights_of_a_file_that_holds_itself_ends(tmp_path):
    content = {"state_dict": lenet().state_dict()}
    content["again"] = content
    torch.save(content, tmp_path / "w")

    load_weights(lenet(), tmp_path / "w")


def test_load_weights_of_hostile_checkpoint_is_refused_and_does_not_run(tmp_path):
    torch.save({"state_dict": lenet().state_dict(), "x": Bomb(tmp_path / "trace")}, tmp_path / "w")

    with pytest.raises(UnsafeWeightsError):
        load_weights(lenet(), tmp_path / "w")
    assert not (tmp_path / "trace").exists()


def test_load_weights_larger_than_their_bytes_are_refused_where_they_are_taken(tmp_path):
    state = lenet().state_dict()
    torch.save({"net": state, "other": {"a": torch.zeros(1).expand(10**9)}}, tmp_path / "w")
    load_weights(lenet(), tmp_path / "w")

    state["9.bias"] = torch.zeros(1).expand(10)
    torch.save(state, tmp_path / "w")
    with pytest.raises(SuspectModelError, match="more than the 4 bytes"):
        load_weights(lenet(), tmp_path / "w")


def test_load_weights_of_another_architecture_is_refused(tmp_path):
    torch.save(ResNet().state_dict(), tmp_path / "w")

    with pytest.raises(SuspectModelError, match=r"missing .*unexpected"):
        load_weights(vgg(), tmp_path / "w")


# --- the digest of what lies outside ordinary tensors


class Outside(nn.Module):
    """A network with content that its state dict lacks; takes (n, 1, 28, 28)."""

    def __init__(self, **content):
        super().__init__()
        torch.manual_seed(0)
        self.body = lenet()
        self.last = None
        for name, value in content.items():
            if name == "buffer":
                self.register_buffer("mean", value, persistent=False)
            else:
                setattr(self, name, value)

    def forward(self, x):
        self.last = x - getattr(self, "shift", 0.0)  # a cache, as code for maps keeps it
        return self.body(self.last)


class WithExtraState(nn.Linear):
    def __init__(self, extra):
        torch.manual_seed(0)
        super().__init__(3, 3)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, weight):
        return self.factor * weight


class Negated(Scaled):
    def forward(self, weight):
        return -self.factor * weight


def parametrised(step):
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", step)
    return layer


def quantised(seed, change=None):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 3))
    if change is not None:
        with torch.no_grad():
            change(model)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM}, dtype=torch.qint8)


def quantised_convolution(value, scale=0.1, zero_point=0):
    layer = torch.ao.nn.quantized.Conv2d(1, 1, 2)
    weight = torch.quantize_per_tensor(torch.full((1, 1, 2, 2), value), scale, zero_point, torch.qint8)
    layer.set_weight_bias(weight, torch.zeros(1))
    return layer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "variants",
    [
        [
            lambda: quantised(0),
            lambda: quantised(0, lambda m: m[0].weight[0, 0].add_(1)),
            lambda: quantised(0, lambda m: m[0].bias[0].add_(1)),
            lambda: quantised(0, lambda m: m[1].weight_hh_l0[0, 0].add_(1)),
        ],
        [
            lambda: quantised_convolution(0.5),
            lambda: quantised_convolution(0.7),
            lambda: quantised_convolution(1.0, scale=0.2),
            lambda: quantised_convolution(0.5, zero_point=1),
        ],
        [lambda: Outside(), lambda: Outside(buffer=torch.zeros(2)), lambda: Outside(buffer=torch.ones(2))],
        [lambda: WithExtraState({"scale": 1}), lambda: WithExtraState({"scale": 2}), lambda: WithExtraState([1.0])],
        [
            lambda: parametrised(Scaled(1.0)),
            lambda: parametrised(Scaled(2.0)),
            lambda: parametrised(Negated(1.0)),
            lambda: nn.utils.parametrizations.orthogonal(parametrised(Scaled(1.0))),
        ],
        [
            lambda: Outside(shift=torch.zeros(1)),
            lambda: Outside(shift=torch.ones(1)),
            lambda: Outside(shifts=[torch.ones(1), np.ones(1)]),
            lambda: Outside(shifts={"a": torch.ones(1), "b": np.zeros(1)}),
        ],
    ],
    ids=["packed", "convolution", "buffers", "extra-state", "parametrisations", "attributes"],
)
def test_digest_of_networks_with_other_answers_differs(variants):
    digests = [SuspectModel(build()).digest for build in variants]

    assert len(set(digests)) == len(variants)
    assert [SuspectModel(build()).digest for build in variants] == digests


@pytest.mark.parametrize("build", [lenet, Vgg, ResNet])
def test_digest_of_an_ordinary_network_is_that_of_its_state_dict(build):
    model = build()

    assert SuspectModel(model).digest == weights_digest(model) == weights_digest(model.state_dict())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_digest_is_the_same_before_and_after_a_forward_pass(tmp_path):
    normed = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(1, 4, 3)), nn.Flatten(), nn.Linear(4 * 26 * 26, 3))
    for model in (Outside(shift=torch.ones(1), buffer=torch.ones(2)), normed):
        before = SuspectModel(model).digest
        suspect = SuspectModel(model)
        suspect.activations(np.random.default_rng(0).random((4, 1, 28, 28), dtype=np.float32))
        assert suspect.digest == before
    later = SuspectModel(Outside(shift=torch.ones(1), buffer=torch.ones(2)))  # made where the cache is filled already
    later.module(torch.rand(1, 1, 28, 28))
    again = SuspectModel(later.module)
    again.activations(np.zeros((2, 1, 28, 28), dtype=np.float32) + 0.5)
    assert again.digest == later.digest


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before 1.6"])
def test_arguments_paths_and_numpy_numbers_beside_the_weights_are_passed_over(tmp_path: Path, is_zip: bool) -> None:
    module, path = nn.Linear(3, 2), tmp_path / "last.pth.tar"
    arguments = argparse.Namespace(lr=1e-3, data=Path("/data"), best=np.float64(0.9), more=argparse.Namespace(x=[1]))
    beside = {"epoch": 3, "args": arguments, "best": np.float32(71.2), "step": np.int64(7), "where": [Path("a")]}
    torch.save({"state_dict": module.state_dict(), **beside}, path, _use_new_zipfile_serialization=is_zip)
    check_weights_file(path)
    other = nn.Linear(3, 2)
    load_weights(other, path, state_key=None, architecture="net:make")
    assert torch.equal(other.weight, module.weight)
    held = read_weights(path)
    assert {type(held[name]).__name__ for name in ("args", "best", "step")} == {"_Ignored"}
    assert not any(vars(held[name]) for name in ("args", "best", "step"))


def test_subclass_of_arguments_is_still_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": nn.Linear(3, 2).state_dict(), "args": _Arguments()}, tmp_path / "w.pt")
    with pytest.raises(UnsafeWeightsError, match="_Arguments, and loading it could run code"):
        check_weights_file(tmp_path / "w.pt")


class _Arguments(argparse.Namespace):
    """Code of the user's own."""


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
            "Git LFS pointer",
            "Run git lfs pull.",
        ),
        (b"\x1f\x8b\x08\x00" + bytes(20), "a gzip archive", "Unpack it first."),
        (b"BZh91AY&SY" + bytes(20), "a bzip2 archive", "Unpack it first."),
        (b"\n<!DOCTYPE html><html><title>404</title></html>", "a web page", "logged in if that is needed."),
        (
            b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
            "a web page",
            "logged in if that is needed.",
        ),
        (b'{"metadata": {}, "weight_map": {}}', "JSON", "save all tensors in one with safetensors."),
    ],
)
def test_file_that_is_not_the_weights_says_how_to_get_them(tmp_path, content, what, remedy):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(UnsafeWeightsError) as caught:
        check_weights_file(tmp_path / "w.pt")
    assert what in str(caught.value)
    assert str(caught.value).endswith(remedy)
    assert "sandbox" not in str(caught.value)


def test_one_of_several_files_says_that_they_must_be_joined(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    part = {name: value for name, value in module.state_dict().items() if name.startswith("0")}
    save_file(part, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(SuspectModelError, match=r"2 missing .* Weights in several files must be joined first"):
        load_weights(module, tmp_path / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_numbers_are_named(tmp_path, dtype):
    module = torch.nn.Linear(2, 3)
    module.register_buffer("mask", torch.full((2,), float("nan")))  # no weight: nobody knows what it is for
    torch.save(module.state_dict(), tmp_path / "w.pt")
    load_weights(module, tmp_path / "w.pt")
    state = {name: value.to(dtype) for name, value in module.state_dict().items()}
    state["weight"][1, 1] = float("nan")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(SuspectModelError, match="entry 'weight' holds NaN, so the network cannot answer"):
        load_weights(module, tmp_path / "w.pt")
