import threading
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import architectures as nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from guard.backups.backup_training import accuracy_of, copy_network
from guard.cli.fitting import tell_multi_label
from guard.config import GuardConfig
from guard.detection.pipeline import Guard
from guard.errors import DataError, SuspectModelError, UnsafeWeightsError
from guard.suspect.model import SuspectModel
from guard.suspect.outputs import logits_of, share_of_several_labels
from guard.suspect.split_points import SplitPoints


def images(shape=(1, 28, 28), n=5):
    return np.random.default_rng(0).random((n, *shape), dtype=np.float32)


def hooks_of(module):
    return [hook for m in module.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def assert_equal(got, wanted, atol=1e-5):
    assert list(got.depths) == list(wanted.depths)
    for (_, left), (_, right) in zip(got.items(), wanted.items(), strict=True):
        np.testing.assert_allclose(left, right, atol=atol)


@pytest.fixture
def suspect():
    torch.manual_seed(0)
    return SuspectModel(nets.lenet())


def test_activations_of_lenet_equal_hand_computation(suspect):
    x = torch.from_numpy(images())
    layers = suspect.module
    with torch.no_grad():
        conv1 = F.relu(layers[0](x))  # (5, 6, 24, 24)
        pool1 = F.max_pool2d(conv1, 2)  # (5, 6, 12, 12)
        conv2 = F.relu(layers[3](pool1))  # (5, 16, 8, 8)
        features = F.max_pool2d(conv2, 2).flatten(1)  # (5, 256)
        logits = layers[9](F.relu(layers[7](features)))

    got = suspect.activations(images())

    assert suspect.split_points == SplitPoints("7", ("1", "2", "4"))
    assert list(got.depths) == ["1", "2", "4"]
    for array, wanted in (
        (got.logits, logits),
        (got.features, features),
        (got.depths["1"], F.adaptive_avg_pool2d(conv1, 9).flatten(1)),  # 6 * 9 * 9 = 486 columns
        (got.depths["2"], F.adaptive_avg_pool2d(pool1, 9).flatten(1)),
        (got.depths["4"], F.adaptive_avg_pool2d(conv2, 5).flatten(1)),  # 16 * 5 * 5 = 400 columns
    ):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (nets.FunctionalNet, (1, 28, 28)),
        (nets.Vgg, (3, 32, 32)),
        (lambda: nets.ResNet("gated"), (3, 32, 32)),
        (nets.DenseNet, (3, 32, 32)),
        (nets.MobileNetV2, (3, 32, 32)),
        (nets.nin, (3, 32, 32)),
        (nets.VisionTransformer, (3, 32, 32)),
        (nets.mlp, (1, 28, 28)),
    ],
)
def test_activations_of_each_family_agree_for_batch_and_single_images(build, shape):
    suspect = SuspectModel(build())
    data = images(shape)

    together = suspect.activations(data)
    one_by_one = suspect.activations(torch.from_numpy(data), batch_size=1)

    assert_equal(one_by_one, together)
    with torch.no_grad():
        np.testing.assert_allclose(together.logits, suspect.module(torch.from_numpy(data)), atol=1e-5)
    assert together.finite_rows.all()
    assert not suspect.module.training
    assert not hooks_of(suspect.module)


def test_activations_are_not_changed_by_later_in_place_operations():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, stride=9)  # (n, 4, 3, 3): flattened without pooling, a view
            self.fc = nn.Linear(36, 3)

        def forward(self, x):
            x.sub_(0.5)
            features = self.conv(x).flatten(1)
            logits = self.fc(features)
            features.zero_()
            return logits

    suspect = SuspectModel(InPlace(), depths=["conv"])
    data = images()
    before = data.copy()
    seen = []

    got = suspect.activations(data)
    with suspect.watch(lambda activations, _: seen.append(activations)), torch.no_grad():
        suspect.module(torch.from_numpy(data.copy())).softmax(1).zero_()
        suspect.module(torch.from_numpy(data.copy())).zero_()

    np.testing.assert_array_equal(data, before)
    with torch.no_grad():
        conv = suspect.module.conv(torch.from_numpy(data - 0.5)).flatten(1)
    for activations in (got, *seen):
        np.testing.assert_allclose(activations.features, conv, atol=1e-6)
        np.testing.assert_allclose(activations.depths["conv"], conv, atol=1e-6)
        np.testing.assert_allclose(activations.logits, got.logits, atol=1e-6)
        assert np.abs(activations.logits).min() > 0


def test_activations_before_in_place_relu_keep_negative_values():
    model = nets.Vgg()

    got = SuspectModel(model, split="classifier.0:output", depths=["features.1"]).activations(images((3, 32, 32)))

    assert got.features.min() < 0  # classifier.1 is an in-place ReLU
    assert got.depths["features.1"].min() < 0


def test_activations_take_no_gradients_and_reset_to_eval(suspect):
    suspect.module.train()

    suspect.activations(images())

    assert not suspect.module.training
    assert all(parameter.grad is None for parameter in suspect.module.parameters())


def test_activations_report_progress_in_images(suspect):
    done = []

    suspect.activations(images(n=5), batch_size=2, progress=done.append)

    assert done == [2, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_activations_of_other_float_models_are_float32(dtype):
    got = SuspectModel(nets.mlp().to(dtype)).activations(images())

    assert {array.dtype for _, array in got.items()} == {np.dtype(np.float32)}


def test_activations_of_read_only_array_are_taken(suspect):
    data = images()
    data.flags.writeable = False

    assert len(suspect.activations(data)) == 5


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([[1.0]], "ndarray or a Tensor, got list"),
        (np.zeros((5, 28, 28), np.float32), r"got \(5, 28, 28\)"),
        (np.zeros((0, 1, 28, 28), np.float32), "n >= 1"),
        (np.zeros((5, 1, 28, 28), np.uint8), "float32, got uint8"),
        (torch.zeros(5, 1, 28, 28, dtype=torch.float64), "float32, got torch.float64"),
    ],
)
def test_activations_of_wrong_images_are_refused(suspect, data, match):
    with pytest.raises(DataError, match=match):
        suspect.activations(data)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_activations_name_the_first_image_that_is_not_finite(suspect, bad, convert):
    data = images(n=300)
    data[271, 0, 3, 4] = bad
    data[280, 0, 0, 0] = bad

    with pytest.raises(DataError, match="image 271 "):
        suspect.activations(convert(data))


def test_activations_remove_hooks_when_the_model_raises(suspect):
    suspect.locate(images())

    with pytest.raises(RuntimeError):
        suspect.activations(images((3, 28, 28)))

    assert not hooks_of(suspect.module)
    assert len(suspect.activations(images())) == 5


def test_activations_from_several_threads_do_not_mix(suspect):
    suspect.locate(images())
    wanted = [suspect.activations(images() + offset) for offset in range(4)]
    got = [None] * 4

    def work(offset):
        for _ in range(5):
            got[offset] = suspect.activations(images() + offset, batch_size=2)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for left, right in zip(got, wanted, strict=True):
        assert_equal(left, right)


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        torch.manual_seed(0)
        self.net = nets.lenet()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.net(x))


Pair = namedtuple("Pair", ["logits", "auxiliary"])
CONTAINERS = [
    pytest.param(lambda y: y, lambda o: o, id="tensor"),
    pytest.param(lambda y: (y, 1), lambda o: o[0], id="tuple"),
    pytest.param(lambda y: [y, 1], lambda o: o[0], id="list"),
    pytest.param(lambda y: Pair(y, 1), lambda o: o.logits, id="named-tuple"),
    pytest.param(lambda y: OrderedDict(logits=y, other=1), lambda o: o["logits"], id="dict"),
    pytest.param(lambda y: SimpleNamespace(logits=y, other=1), lambda o: o.logits, id="object"),
]


@pytest.mark.parametrize(("wrap", "unwrap"), CONTAINERS)
def test_watch_replaces_logits_in_every_kind_of_output(wrap, unwrap):
    suspect = SuspectModel(Wrapped(wrap))
    data = images()
    plain = suspect.activations(data)
    seen = []

    def replace(activations, inputs):
        seen.append((activations, inputs))
        return torch.full(activations.logits.shape, 7.0)

    with suspect.watch(replace), torch.no_grad():
        output = suspect.module(torch.from_numpy(data))

    assert type(output) is type(wrap(torch.zeros(1)))
    assert (unwrap(output) == 7).all()
    assert_equal(seen[0][0], plain)
    np.testing.assert_array_equal(seen[0][1], data)


@pytest.mark.parametrize("wrap", [lambda y: None, lambda y: {"scores": y[0]}, lambda y: y.argmax(1), lambda y: "cat"])
def test_activations_of_model_without_logits_are_refused(wrap):
    with pytest.raises(SuspectModelError, match=r"must return logits of shape \(n, n_classes\)"):
        SuspectModel(Wrapped(wrap)).activations(images())


def test_watch_calls_back_once_per_forward_and_leaves_the_answer_alone(suspect):
    x = torch.from_numpy(images())
    wanted = suspect.activations(images())
    seen = []
    unwatched = suspect.module(x)

    with suspect.watch(lambda activations, _: seen.append(activations)):
        outputs = [suspect.module(x), suspect.module(x[:1])]
        outputs[0].sum().backward()  # gradients stay the caller's business
    suspect.module(x)

    assert torch.equal(outputs[0], unwatched)
    assert [len(activations) for activations in seen] == [5, 1]
    assert_equal(seen[0], wanted)
    assert not hooks_of(suspect.module)


@pytest.mark.parametrize("signature", ["*, images", "images, lengths", ""])
def test_suspect_whose_forward_does_not_take_the_images_alone_is_refused(signature):
    namespace = {}
    exec(f"def forward(self{', ' if signature else ''}{signature}): ...", namespace)
    network = type("Odd", (nn.Module,), {"forward": namespace["forward"]})()
    with pytest.raises(SuspectModelError, match=r"^forward of the suspect model \(Odd\) must be callable"):
        SuspectModel(network)


def test_watch_passes_keyword_inputs_on(suspect):
    suspect.locate(images())
    x = torch.from_numpy(images())
    seen = []

    with suspect.watch(lambda _, inputs: seen.append(inputs)):
        suspect.module(input=x)

    assert seen[0] is x


def test_watch_does_not_see_forward_passes_of_the_guard_itself(suspect):
    x = torch.from_numpy(images())
    seen = []

    def look_again(activations, inputs):
        seen.append(len(activations))
        suspect.activations(images(n=2))
        suspect.module(inputs)

    with_points = suspect.activations(images())
    with suspect.watch(look_again):
        assert_equal(suspect.activations(images()), with_points)
        suspect.module(x)

    assert seen == [5]


def test_watch_in_several_threads_calls_back_in_each(suspect):
    suspect.locate(images())
    wanted = {n: suspect.activations(images(n=n)) for n in (1, 2, 3, 4)}
    seen = []

    def work(n):
        for _ in range(10):
            suspect.module(torch.from_numpy(images(n=n)))

    with suspect.watch(lambda activations, _: seen.append(activations)):
        threads = [threading.Thread(target=work, args=(n,)) for n in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert sorted(len(activations) for activations in seen) == sorted(list(wanted) * 10)
    for activations in seen:
        assert_equal(activations, wanted[len(activations)])


def test_watch_lets_an_error_of_the_callback_out_and_goes_on(suspect):
    suspect.locate(images())
    x = torch.from_numpy(images())
    seen = []

    def refuse(activations, _):
        seen.append(len(activations))
        raise ValueError("no")

    with suspect.watch(refuse):
        for _ in range(2):
            with pytest.raises(ValueError, match="no"):
                suspect.module(x)

    assert seen == [5, 5]
    assert not hooks_of(suspect.module)


def test_watch_never_mixes_in_what_a_failed_forward_left_behind():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.early = nn.Conv2d(1, 4, 3)
            self.fc = nn.Linear(4, 3)
            self.mood = "good"

        def forward(self, x):
            y = self.early(x) if self.mood != "skip" else x.expand(-1, 4, -1, -1)
            if self.mood == "fail":
                raise RuntimeError("failed")
            return self.fc(y.mean((2, 3)))

    suspect = SuspectModel(Moody(), depths=["early"])
    suspect.locate(images())
    x = torch.from_numpy(images())

    with suspect.watch(lambda *_: None):
        suspect.module.mood = "fail"
        with pytest.raises(RuntimeError, match="failed"):
            suspect.module(x)
        suspect.module.mood = "skip"
        with pytest.raises(SuspectModelError, match="layer 'early' gave no tensor"):
            suspect.module(x)


def test_watch_without_split_points_is_refused(suspect):
    with pytest.raises(SuspectModelError, match="no split points"), suspect.watch(lambda *_: None):
        pass


def test_use_split_points_of_a_bundle_gives_the_same_activations(suspect):
    wanted = suspect.activations(images())
    other = SuspectModel(suspect.module)

    other.use_split_points(suspect.split_points)

    assert_equal(other.activations(images()), wanted)


def test_use_split_points_of_another_model_is_refused(suspect):
    with pytest.raises(SuspectModelError, match="no layer 'layer1'"):
        suspect.use_split_points(SplitPoints("7", ("layer1",)))
    assert suspect.split_points is None


def test_locate_from_one_image_fixes_the_points(suspect):
    assert suspect.split_points is None

    points = suspect.locate(images(n=1))

    assert suspect.split_points is points
    assert points.split == "7"


def test_suspect_model_scripted_or_compiled_is_refused():
    with pytest.warns(DeprecationWarning, match="jit.script"):
        scripted = torch.jit.script(nets.lenet())
    compiled_in_place = nets.lenet()
    compiled_in_place.compile(backend="eager")

    for module, match in (
        (scripted, "TorchScript"),
        (nn.Sequential(scripted), "TorchScript"),
        (torch.compile(nets.lenet(), backend="eager"), "torch.compile"),
        (compiled_in_place, "torch.compile"),
        (nn.DataParallel(nets.lenet()), "DataParallel"),
        (len, "torch.nn.Module, got builtin"),
    ):
        with pytest.raises(SuspectModelError, match=match):
            SuspectModel(module)


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_load_gives_the_same_model_from_every_format(suspect, tmp_path, save):
    save(suspect.module.state_dict(), tmp_path / "w")

    loaded = SuspectModel.load(tmp_path / "w", "architectures:lenet", depths=["1"])

    assert loaded.digest == suspect.digest
    np.testing.assert_array_equal(loaded.activations(images()).logits, suspect.activations(images()).logits)
    assert loaded.split_points == SplitPoints("7", ("1",))
    assert loaded.device == torch.device("cpu")


def test_load_of_whole_module_is_refused(suspect, tmp_path):
    torch.save(suspect.module, tmp_path / "w")

    with pytest.raises(UnsafeWeightsError, match="whole module"):
        SuspectModel.load(tmp_path / "w", "architectures:lenet")


@pytest.mark.parametrize(
    ("architecture", "match"),
    [
        ("architectures", 'must be "package.module:factory"'),
        ("architectures:", 'must be "package.module:factory"'),
        ("no_such_package.x:y", "cannot be imported: ModuleNotFoundError"),
        ("architectures:LeNet", "has no 'LeNet'"),
        ("architectures:BasicBlock", "callable without arguments"),
        ("builtins:dict", "must return a torch.nn.Module, got dict"),
        ("math:pi", "callable without arguments"),
    ],
)
def test_load_of_bad_architecture_says_what_is_wrong(suspect, tmp_path, architecture, match):
    torch.save(suspect.module.state_dict(), tmp_path / "w")

    with pytest.raises(SuspectModelError, match=match):
        SuspectModel.load(tmp_path / "w", architecture)


def test_load_of_weights_that_do_not_fit_counts_the_keys(suspect, tmp_path):
    state = suspect.module.state_dict()
    state["extra"] = torch.ones(1)
    del state["0.bias"]
    state["9.weight"] = torch.ones(43, 32)
    torch.save(state, tmp_path / "w")

    with pytest.raises(SuspectModelError) as caught:
        SuspectModel.load(tmp_path / "w", "architectures:lenet")

    assert "1 missing (0.bias); 1 unexpected (extra); 1 of another shape (9.weight (43, 32)" in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_activations_on_cuda_equal_those_on_the_cpu(suspect):
    wanted = suspect.activations(images())

    on_gpu = SuspectModel(suspect.module, device="cuda")

    assert_equal(on_gpu.activations(images()), wanted, atol=1e-3)


# --- what the network returns


class Returning(nn.Module):
    """Class k of ten is the brightest of ten rows; `wrap` makes what it returns of hidden numbers and logits."""

    def __init__(self, wrap, n_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.hidden = nn.Linear(28 * 28, 12)
        self.fc = nn.Linear(28 * 28, n_classes)
        self.wrap = wrap
        with torch.no_grad():
            self.conv.weight.fill_(1.0)
            self.conv.bias.zero_()
            self.fc.bias.zero_()
            self.fc.weight.zero_()
            for k in range(n_classes):
                self.fc.weight.view(n_classes, 28, 28)[k, k] = 1.0

    def forward(self, x):
        flat = self.conv(x).flatten(1)
        return self.wrap(self.hidden(flat), self.fc(flat))


def labelled(n=60, n_classes=10):
    labels = np.arange(n) % n_classes
    data = 0.1 * images(n=n)
    data[np.arange(n), 0, labels] += 1.0
    return data, labels


Named = namedtuple("Named", ["embedding", "scores"])


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda h, y: y, ""),
        (lambda h, y: (y, h), ""),
        (lambda h, y: (h, y), "1"),
        (lambda h, y: [h, y, h], "1"),
        (lambda h, y: {"features": h, "out": y}, "out"),
        (lambda h, y: {"heads": {"class": y, "box": h[:, :4]}, "loss": h.sum()}, "heads.class"),
        (lambda h, y: {"hidden": h, "logits": y}, ""),
        (lambda h, y: Named(h, y), "scores"),
        (lambda h, y: SimpleNamespace(embedding=h, scores=y), "scores"),
        (lambda h, y: (h, [h, (h, y)]), "1.1.1"),
        (lambda h, y: (y.softmax(1), y), ""),  # the usual place, and the same answers
        (lambda h, y: {"probabilities": y.softmax(1), "raw": y}, "raw"),
        (lambda h, y: (h, y.flip(1), y), "2"),
        (lambda h, y: (h[:, :10], y, h), "1"),
    ],
)
def test_locate_finds_the_logits_in_any_container(wrap, place):
    torch.manual_seed(0)
    suspect = SuspectModel(Returning(wrap))
    data, labels = labelled()

    points = suspect.locate(data, labels)
    got = suspect.activations(data)

    assert points.output == place
    assert (got.predicted_labels == labels).mean() > 0.9 or "softmax" in str(place)
    other = SuspectModel(suspect.module)
    other.use_split_points(SplitPoints.from_dict(points.as_dict()))
    np.testing.assert_array_equal(other.activations(data).logits, got.logits)
    with suspect.watch(lambda *_: torch.full((60, 10), 7.0)), torch.no_grad():
        changed = suspect.module(torch.from_numpy(data))
    assert torch.equal(logits_of(changed, place), torch.full((60, 10), 7.0))


def test_locate_of_two_heads_with_other_answers_asks_and_takes_the_one_named():
    torch.manual_seed(0)

    def wrap(h, y):
        return {"a": y, "b": y + 0.9 * y.roll(1, 1) * (torch.arange(len(y)) % 20 == 0)[:, None]}

    data, labels = labelled()
    with pytest.raises(SuspectModelError, match=r"'a' \(10 numbers\), 100 % right, 'b' .*--output"):
        SuspectModel(Returning(lambda h, y: {"a": y, "b": torch.cat([y[:1].roll(1, 1), y[1:]])})).locate(data, labels)
    with pytest.raises(SuspectModelError, match="several tensors"):
        SuspectModel(Returning(wrap)).locate(data)
    for name in ("a", "b"):
        assert SuspectModel(Returning(wrap), output=name).locate(data).output == name
    with pytest.raises(SuspectModelError, match=r"no 'c' .*'a' \(10 numbers\)"):
        SuspectModel(Returning(wrap), output="c").locate(data)


def test_locate_of_outputs_narrower_than_the_labels_is_refused():
    data, labels = labelled()

    with pytest.raises(SuspectModelError, match="10 or more classes"):
        SuspectModel(Returning(lambda h, y: {"a": y[:, :4], "b": h[:, :3]})).locate(data, labels)


@pytest.mark.parametrize("shape", [lambda z: z, lambda z: z[:, 0], lambda z: (torch.zeros(len(z), 7), z)])
@pytest.mark.parametrize("squash", [lambda z: z, torch.sigmoid])
def test_one_logit_is_guarded_as_two_classes(shape, squash):
    torch.manual_seed(0)
    suspect = SuspectModel(Returning(lambda h, y: shape(squash(y[:, 1:] - y[:, :1])), n_classes=2))
    data, labels = labelled(n_classes=2)
    x = torch.from_numpy(data)

    points = suspect.locate(data, labels)
    got = suspect.activations(data)

    assert got.logits.shape == (60, 2)
    assert (got.predicted_labels == labels).all()
    assert points.output.endswith(":one-logit" if squash(torch.tensor(3.0)) == 3 else ":one-probability")
    plain = suspect.module(x)
    flipped = torch.from_numpy(got.logits.copy())
    flipped[3] = flipped[3].flip(0)
    with suspect.watch(lambda *_: flipped), torch.no_grad():
        changed = suspect.module(x)
    before, after = (out[1] if isinstance(out, tuple) else out for out in (plain, changed))
    assert before.shape == after.shape
    assert [row for row in range(60) if not torch.equal(before[row], after[row])] == [3]
    np.testing.assert_allclose(logits_of(changed, points.output)[3], flipped[3] - flipped[3, 0], atol=1e-4)


def test_multi_label_classifiers_are_refused_by_name():
    data, labels = labelled()
    several = Returning(lambda h, y: (y / 14).sigmoid())
    configured = Returning(lambda h, y: y)
    configured.config = SimpleNamespace(problem_type="multi_label_classification")

    for module, given in ((several, labels), (several, None), (configured, labels)):
        with pytest.raises(SuspectModelError, match="multi-label"):
            SuspectModel(module).locate(data, given)
    with pytest.raises(SuspectModelError, match=r"multi-label .* labels have shape \(60, 10\)"):
        SuspectModel(Returning(lambda h, y: y)).locate(data, np.eye(10)[labels])
    single = SuspectModel(Returning(lambda h, y: (8 * (y - 14)).sigmoid()))
    assert single.locate(data, labels).output == ""  # one sigmoid per class, and one class per image


def trained(n_classes: int, *, each_by_itself: bool, seed: int = 0) -> np.ndarray:
    """Logits of a network that has learned which of some patterns an input holds: one, or one to three."""
    torch.manual_seed(seed)
    patterns, main = 1.5 * torch.randn(n_classes, 40), torch.randint(n_classes, (2500,))
    held = nn.functional.one_hot(main, n_classes).float()
    if each_by_itself:
        held = held.maximum((torch.rand_like(held) < 1 / n_classes).float())
    inputs = held @ patterns + torch.randn(2500, 40)
    network = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, n_classes))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        logits = network(inputs[:2000])
        if each_by_itself:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, held[:2000])
        else:
            loss = nn.functional.cross_entropy(logits, main[:2000])
        loss.backward()
        optimizer.step()
    return network(inputs[2000:]).detach().numpy()


@pytest.mark.parametrize("n_classes", [3, 10, 40])
def test_logits_of_a_multi_label_network_are_noticed_and_those_of_single_classes_are_not(n_classes, capfd):
    logits = trained(n_classes, each_by_itself=True)
    assert share_of_several_labels(logits) == ((logits > 0).sum(1) > 1).mean() > 0.3
    assert share_of_several_labels(trained(n_classes, each_by_itself=False)) == 0.0
    tell_multi_label(SimpleNamespace(reference=SimpleNamespace(logits=logits)))
    told = " ".join(capfd.readouterr().err.split())
    assert f"two or more of the network's {n_classes} logits are positive" in told


def test_copies_of_a_network_know_where_their_logits_are():
    torch.manual_seed(0)
    suspect = SuspectModel(Returning(lambda h, y: (h, y)))
    data, labels = labelled()
    suspect.locate(data, labels)

    assert accuracy_of(copy_network(suspect.module), data, labels) > 0.9


def test_guard_of_a_network_that_returns_features_first_keeps_its_place(tmp_path):
    torch.manual_seed(0)
    data, labels = labelled(n=100)
    suspect = SuspectModel(Returning(lambda h, y: (h, y)))
    config = GuardConfig(false_positive_rate=0.1, folds=2)

    guard = Guard.fit(suspect, data, labels, config)
    loaded = Guard.load(guard.save(tmp_path), SuspectModel(suspect.module))

    assert guard.reference.logits.shape == (100, 10)
    assert loaded.split_points.output == "1"
    assert [v.label for v in loaded.inspect(data)] == labels.tolist()
