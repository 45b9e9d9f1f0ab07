"""The one reader of labelled folders: links, litter, names in two spellings, formats, channels, missing classes."""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guard.cli.bodies import find_bodies
from guard.cli.classes import check_classes, check_order, tell_scale
from guard.cli.fitting import images_per_class
from guard.cli.images import (
    NamedLabelledImages,
    as_fitted,
    find_images,
    find_labelled,
    naming_rows,
    without_labels,
)
from guard.cli.model import class_list
from guard.cli.reading import in_channels_taken, preprocessing, read_all
from guard.data.labelled_folders import find_files, labels_of
from guard.errors import ArchiveError, ConfigError, DataError, RowError
from guard.files import decoded
from guard.suspect.model import SuspectModel
from guard.torchserve.archives.class_list import read_class_list


def picture(path: Path, colour: object = 80, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 4), colour).save(path)


def by_name(found: NamedLabelledImages) -> dict[str, int]:
    return dict(zip(found.names, found.labels.tolist(), strict=True))


def silent(_text: str, _share: float) -> None:
    """Report nothing."""


def test_classes_that_are_links_are_read_wherever_they_lead(tmp_path: Path) -> None:
    picture(tmp_path / "clean" / "0" / "a.png")
    picture(tmp_path / "elsewhere" / "deep" / "b.webp")
    picture(tmp_path / "files" / "c.bmp")
    (tmp_path / "clean" / "1").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "clean" / "2").mkdir()
    (tmp_path / "clean" / "2" / "c.bmp").symlink_to("../../files/c.bmp")
    (tmp_path / "all").symlink_to(tmp_path / "clean")
    expected = {"0/a.png": 0, "1/deep/b.webp": 1, "2/c.bmp": 2}
    assert by_name(find_labelled(tmp_path / "clean")) == expected
    assert by_name(find_labelled(tmp_path / "all")) == expected
    assert find_images(tmp_path / "all").names == list(expected)


def test_links_within_the_folder_make_no_cycle(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "a.png")
    picture(tmp_path / "dog" / "b.png")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "cat" / "self").symlink_to(tmp_path / "cat")
    (tmp_path / "dog" / "again").symlink_to(tmp_path / "dog")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    files, folders = find_files(tmp_path)
    assert [file.name for file in files] == ["cat/a.png", "dog/b.png"]
    assert folders == ["cat", "dog", "itself"]


def test_class_whose_link_is_broken_or_that_is_empty_keeps_its_place(tmp_path: Path) -> None:
    for name in ("ant", "cow"):
        picture(tmp_path / name / "a.png")
    (tmp_path / "bee").symlink_to(tmp_path / "unmounted")
    found = find_labelled(tmp_path)
    assert by_name(found) == {"ant/a.png": 0, "cow/a.png": 2}
    with pytest.raises(DataError, match=r"1 of the network's 3 classes have no clean image: 'bee'\."):
        check_classes(found, 3)
    assert check_classes(found, 3, allow_missing=True) is found
    two = check_classes(found, 2)  # a folder of notes, say, in a set of two classes
    assert two.labels.tolist() == [0, 1]
    assert two.class_names == ["ant", "cow"]


def test_classes_with_few_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(10):
        picture(tmp_path / "many" / f"{number}.png")
        if number < 9:
            picture(tmp_path / "few" / f"{number}.png")
    found = check_classes(find_labelled(tmp_path), 2)
    told = " ".join(capsys.readouterr().err.split())
    assert "1 classes have fewer than 10 clean images: 'few' (9)." in told
    assert "many" not in told
    assert (
        images_per_class(found.labels, 2, found.class_names)
        == "9 to 10 of each of 2 classes; fewest: 'few' (9), 'many' (10)"
    )
    assert images_per_class(np.array([0, 1, 1, 0]), 2, None) == "2 of each of 2 classes"


def test_files_beside_the_class_folders_are_passed_over_and_named(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "a.png")
    picture(tmp_path / "overview.png")
    for name in ("classes.txt", "cat/notes.md", "Thumbs.db", "cat/desktop.ini", ".DS_Store", "cat/._a.png"):
        (tmp_path / name).write_bytes(b"x")
    picture(tmp_path / "__MACOSX" / "cat" / "._a.png")
    found = find_labelled(tmp_path)
    assert found.names == ["cat/a.png"]
    assert found.passed_over == ["classes.txt", "overview.png", "cat/notes.md"]
    assert find_labelled(tmp_path, as_bytes=True).names == ["cat/a.png", "cat/notes.md"]
    assert find_bodies(tmp_path).passed_over == ["classes.txt", "overview.png"]
    assert find_images(tmp_path).names == ["cat/a.png", "overview.png"]


def test_folder_without_classes_or_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        find_labelled(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="has no labels"):
        find_labelled(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.txt").touch()
    with pytest.raises(DataError, match="holds no images"):
        find_labelled(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        find_images(tmp_path / "nowhere")


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_list", ["NFC", "NFD"])
def test_names_in_composed_and_decomposed_form_are_one_name(tmp_path: Path, on_disk: str, in_list: str) -> None:
    names = ["zèbre", "âne", "Über"]
    for name in names:
        picture(tmp_path / "clean" / unicodedata.normalize(on_disk, name) / "a.png")
    (tmp_path / "classes.txt").write_text(unicodedata.normalize(in_list, "\n".join(names)), encoding="utf-8")
    found = find_labelled(tmp_path / "clean", class_names=class_list(str(tmp_path / "classes.txt")))
    assert found.class_names == names
    assert by_name(found) == {f"{name}/a.png": label for label, name in enumerate(names)}


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_class_list_is_read_in_every_encoding(tmp_path: Path, encoding: str, end: str) -> None:
    names = ["zèbre", "âne", "Über, groß"]
    (tmp_path / "classes").write_bytes((end.join(names) + end + end).encode(encoding))
    assert class_list(str(tmp_path / "classes")) == names


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_class_list_of_an_archive_is_read_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "index_to_name.json").write_bytes(
        '{"0": "âne", "1": "e\u0301tat"}'.replace("\u0301", "").encode(encoding)
    )
    classes = read_class_list(tmp_path)
    assert classes is not None
    assert classes.labels == {"âne": 0, "etat": 1}


def test_class_list_of_an_archive_is_composed(tmp_path: Path) -> None:
    (tmp_path / "index_to_name.json").write_text('{"0": "a\u0302ne", "1": ["n1", "e\u0301tat"]}', encoding="utf-8")
    classes = read_class_list(tmp_path)
    assert classes is not None
    assert classes.labels == {"âne": 0, "n1": 1, "état": 1}


def test_class_list_in_a_file_that_is_not_there_is_no_name() -> None:
    with pytest.raises(ConfigError, match=r"--class-names clases\.txt: there is no such file"):
        class_list("clases.txt")
    assert class_list("cat,dog") == ["cat", "dog"]


def test_decoded_keeps_what_only_windows_writes() -> None:
    assert decoded(b"\x80 \x93x\x94") == "\u20ac \u201cx\u201d"
    assert decoded(b"\x81\x80") == "\x81\x80"
    assert decoded(b"") == ""


def takes(channels: int):
    """Return what runs images as a network with so many channels does."""

    def run(images: list[np.ndarray]) -> None:
        if any(len(image) != channels for image in images):
            raise ValueError("other channels")

    return run


@pytest.mark.parametrize(
    ("modes", "channels", "told"),
    [
        (["L", "L"], 1, ""),
        (["L", "L"], 3, "read as RGB, as the image handler converts them: 2 grey of 2 images"),
        (["RGB", "RGB"], 3, ""),
        (["RGB", "RGB"], 1, "read as L, as the image handler converts them: 2 colour of 2 images"),
        (
            ["P", "RGBA", "L", "RGB"],
            3,
            "read as RGB, as the image handler converts them: 1 palette, 1 alpha, 1 grey of 4",
        ),
        (["RGB", "RGBA"], 4, "read as RGBA, as the image handler converts them: 1 colour of 2 images"),
        (
            ["L", "1", "LA"],
            1,
            "read as L, as the image handler converts them: 1 black and white, 1 grey with alpha of 3",
        ),
    ],
)
def test_pictures_are_read_in_the_channels_of_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], modes: list[str], channels: int, told: str
) -> None:
    for row, mode in enumerate(modes):
        picture(tmp_path / "cat" / f"{row}.png", None, mode)
    found = in_channels_taken(find_labelled(tmp_path), takes(channels))
    assert {found.read(row).shape for row in range(len(modes))} == {(channels, 4, 4)}
    said = " ".join(capsys.readouterr().err.split())
    assert (told in said) if told else (said == "")


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("L", 4), ("RGB", 1), ("RGB", 3), ("RGB", 4)])
def test_pixels_of_a_npz_become_what_pictures_of_a_folder_become(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, channels: int
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 6, 5) if mode == "L" else (4, 6, 5, 3), dtype=np.uint8)
    for row in range(4):
        (tmp_path / "folder" / "cat").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[row]).save(tmp_path / "folder" / "cat" / f"{row}.png")
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.zeros(4, np.int64))
    folder, arrays = (
        in_channels_taken(find_labelled(path), takes(channels)) for path in (tmp_path / "folder", tmp_path / "a.npz")
    )
    for row in range(4):
        np.testing.assert_array_equal(arrays.read(row), folder.read(row))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (0 if (mode, channels) == ("RGB", 3) else 2)
    assert said[:1] == said[1:]


@pytest.mark.parametrize(("given", "taken"), [(1, 3), (3, 1), (3, 4)])
def test_float_images_in_other_channels_than_the_network_takes_are_refused_by_name(
    tmp_path: Path, given: int, taken: int
) -> None:
    np.savez(tmp_path / "a.npz", images=np.ones((4, given, 6, 5), np.float32), labels=np.zeros(4, np.int64))
    found = find_labelled(tmp_path / "a.npz")
    with pytest.raises(DataError, match=rf"^the images have {given} channels, and the network takes {taken}\. .*uint8"):
        in_channels_taken(found, takes(taken), at_once=2)
    assert in_channels_taken(found, takes(given)) is found
    assert in_channels_taken(found, takes(2)) is found  # something else is wrong: said when all are read


def test_first_picture_that_cannot_be_read_does_not_decide_the_channels(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    picture(tmp_path / "1.png")
    assert in_channels_taken(find_images(tmp_path), takes(3)).read(1).shape == (3, 4, 4)
    assert in_channels_taken(find_images(tmp_path), takes(2)).read(1).shape == (1, 4, 4)


def test_image_that_becomes_nan_is_named_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "cat" / "a.png", 80)
    picture(tmp_path / "cat" / "black.png", 0)
    (tmp_path / "my_scaling.py").write_text(
        "def scale(images):\n    return images / images.max(axis=(1, 2, 3), keepdims=True)"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with np.errstate(invalid="ignore"), pytest.raises(DataError, match=r"^image cat/black\.png: .* NaN"):
        read_all(find_labelled(tmp_path), preprocessing("my_scaling:scale"), silent)
    with pytest.raises(DataError, match=r"^image cat/black\.png: it becomes NaN"), naming_rows(find_labelled(tmp_path)):
        raise RowError("it becomes NaN.", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "images + np.random.default_rng().normal(0, 0.01, images.shape)",
            r"another each time.* Leave out what is rand",
        ),
        ("images[:, :, :: next(SIDES)]", r"another each time.* Leave out what is random"),
        ("images - images.mean()", r"another alone than among others.* Scale each image by itself"),
        ("(images - images.mean((1, 2, 3), keepdims=True)) / 0.3", ""),
        ("images + np.float32(1e-6) * len(images)", ""),  # rounding
    ],
)
def test_images_that_become_something_else_each_time_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, message: str
) -> None:
    for number in range(90):
        (tmp_path / "cat").mkdir(exist_ok=True)
        shades = np.arange(16, dtype=np.uint8).reshape(4, 4) * 9 + number
        Image.fromarray(shades).save(tmp_path / "cat" / f"{number:02}.png")
    start = "import itertools\nimport numpy as np\nSIDES = itertools.cycle([1, -1])"
    (tmp_path / "my_change.py").write_text(f"{start}\n\n\ndef change(images):\n    return {change}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_change", raising=False)
    found, convert = find_labelled(tmp_path), preprocessing("my_change:change")
    if message:
        with pytest.raises(DataError, match=rf"^image cat/\d\d\.png: what the network takes of it is {message}"):
            read_all(found, convert, silent)
    else:
        assert read_all(found, convert, silent).shape == (90, 1, 4, 4)


def test_all_pictures_that_cannot_be_read_are_named_at_once(tmp_path: Path) -> None:
    for number in range(90):
        picture(tmp_path / "cat" / f"{number:02}.png")
    whole = (tmp_path / "cat" / "00.png").read_bytes()
    for number in (7, 40, 88):
        (tmp_path / "cat" / f"{number:02}.png").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"^image cat/07\.png: .* So it is with 2 more: cat/40\.png, cat/88\.png\.$"):
        read_all(find_labelled(tmp_path), preprocessing(None), silent)
    for number in range(60):
        (tmp_path / "cat" / f"{number:02}.png").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"at least 59 more: cat/01\.png, .*cat/05\.png, \.\.\.\.$"):
        read_all(find_labelled(tmp_path), preprocessing(None), silent)


def test_bodies_are_parsed_or_left_alone_as_the_handler_takes_them(tmp_path: Path) -> None:
    for name, text in {"a.json": '{"data": 1}', "b.json": '{"data": 2}'}.items():
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / name).write_text(text)

    def answers_parsed(body: object) -> None:
        body["data"]  # type: ignore[index]

    def answers_bytes(body: object) -> None:
        json.loads(bytes(body))  # type: ignore[call-overload]

    assert find_bodies(tmp_path).read(1) == {"data": 2}
    assert find_bodies(tmp_path, answers=answers_parsed).read(1) == {"data": 2}
    assert find_bodies(tmp_path, answers=answers_bytes).read(1) == b'{"data": 2}'
    assert find_bodies(tmp_path, answers=lambda body: 1 / 0).read(1) == {"data": 2}


def test_images_are_those_of_the_fit_whatever_the_classes_are_called(tmp_path: Path) -> None:
    for name in ("n1", "n2", "n2/more"):
        picture(tmp_path / name / "a.png")
    found = find_labelled(tmp_path)
    assert found.labels.tolist() == [0, 1, 1]
    assert as_fitted(found, np.array([7, 3, 3])).labels.tolist() == [7, 3, 3]  # as a class list or an archive has them
    for other in ([7, 3], [7, 3, 4], [3, 3, 3]):
        assert as_fitted(found, np.array(other)) is found
    assert as_fitted(found, None) is found


def test_sub_folders_of_one_class_are_those_of_the_fit_where_more_than_their_number_tells(tmp_path: Path) -> None:
    for name in ("cat", "dog", "kitty"):
        picture(tmp_path / name / "a.png")
    found = find_labelled(tmp_path)
    assert found.labels.tolist() == [0, 1, 2]
    fitted = np.array([0, 1, 0])
    assert as_fitted(found, fitted, ["kitty", "dog"]).labels.tolist() == [0, 1, 0]
    assert as_fitted(found, fitted, ["cat", "dog"]).labels.tolist() == [0, 1, 0]
    assert as_fitted(found, fitted, ["puss", "dog"]) is found  # any folders might have as many images
    assert as_fitted(found, fitted, ["puss", "dog"], is_its_folder=True).labels.tolist() == [0, 1, 0]
    assert as_fitted(found, fitted, None, is_its_folder=True) is found  # labels were numbers: none has two names
    picture(tmp_path / "cat" / "b.png")
    two = find_labelled(tmp_path)
    assert two.labels.tolist() == [0, 0, 1, 2]
    assert as_fitted(two, np.array([0, 1, 1, 0]), ["cat", "dog"], is_its_folder=True) is two  # a folder of two classes


@pytest.mark.parametrize(
    "text",
    [
        '["zebra", "no, entry"]',
        '{"1": "no, entry", "0": "zebra"}',
        '{"no, entry": 1, "zebra": 0}',
        '{"0": ["n01", "zebra"], "1": ["n02", "no, entry"]}',
    ],
)
def test_class_list_in_json_is_read_in_every_usual_form(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.json").write_text(text)
    assert class_list(str(tmp_path / "classes.json")) == ["zebra", "no, entry"]


def test_folders_may_have_any_name_that_the_class_list_gives_a_class(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('{"0": ["n01", "zebra"], "1": ["n02", "cat", "puss"], "2": ["n03", "puss"]}')
    names = class_list(str(tmp_path / "classes.json"))
    assert names == ["zebra", "puss", "puss"]
    labels, found = labels_of(["n02", "zebra", "cat", "n03"], ["cat", "n02", "n03", "zebra"], names)
    np.testing.assert_array_equal(labels, [1, 0, 1, 2])
    assert found == names
    with pytest.raises(DataError, match=r"sub-folder 'puss' has a name that several classes .* have: 1, 2\."):
        labels_of(["puss"], ["puss"], names)
    with pytest.raises(DataError, match=r"sub-folder 'dog' is not in the class list \(zebra, puss, puss\)\."):
        labels_of(["dog"], ["dog"], names)


def test_name_twice_in_a_class_list_means_none_of_its_classes() -> None:
    names = [f"name {label}" for label in range(30)]
    names[7] = names[20] = "crane"  # the bird, and the machine
    with pytest.raises(DataError, match=r"sub-folder 'crane' .* have: 7, 20\."):
        labels_of(["crane"], ["crane"], names)
    assert labels_of(["name 29"], ["name 29"], names)[0].tolist() == [29]
    with pytest.raises(DataError, match=r"class list \(name 0, .*, name 19 and 10 more\)\."):
        labels_of(["dog"], ["dog"], [*names[:7], "n", *names[8:20], *names[21:], "m"])


def test_class_list_in_json_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('{"zebra": 1, "cat": 2}')
    with pytest.raises(ConfigError, match="without a gap"):
        class_list(str(tmp_path / "classes.json"))
    (tmp_path / "classes.json").write_text("zebra")
    with pytest.raises(ArchiveError, match=r"classes\.json must give a name for every label"):
        class_list(str(tmp_path / "classes.json"))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["1", "2", "3"], r"counted from 1\. Subtract 1, .* --class-names 1,2,3$"),
        (["0", "1", "5"], r"got 0 to 5\. Number the classes from 0"),
        (["0", "1", "2", "2_copy"], r"4 names of classes .*'2_copy'.* the network has 3. Take out"),
    ],
)
def test_labels_beyond_the_network_say_what_to_do(tmp_path: Path, folders: list[str], message: str) -> None:
    for folder in folders:
        picture(tmp_path / folder / "a.png")
    with pytest.raises(DataError, match=message):
        check_classes(find_labelled(tmp_path), 3)


def test_file_that_is_no_image_and_no_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "clean.zip").touch()
    with pytest.raises(DataError, match=r"has no labels: .* Unpack it first"):
        find_labelled(tmp_path / "clean.zip")
    np.save(tmp_path / "clean.npy", np.zeros((4, 6, 5)))
    with pytest.raises(DataError, match=r"clean\.npy has no labels: .* or a \.npz with 'labels'\.$"):
        find_labelled(tmp_path / "clean.npy")
    with pytest.raises(DataError, match=r"clean\.zip is no image by its name"):
        find_images(tmp_path / "clean.zip")


class Brightness(torch.nn.Module):
    """Says which third of [-1, 1] the mean of an image lies in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(1, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[-2.0], [0.0], [2.0]]))
            self.head.bias.copy_(torch.tensor([-0.5, 0.0, -0.5]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.mean((1, 2, 3))[:, None])


def bright_images() -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(60) % 3
    noise = np.random.default_rng(0).normal(0, 0.02, (60, 1, 4, 4))
    return (0.2 + 0.3 * labels[:, None, None, None] + noise).astype(np.float32), labels


def test_images_of_another_scale_than_the_networks_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    suspect = SuspectModel(Brightness(), depths=())
    images, labels = bright_images()
    tell_scale(suspect, images, labels)
    assert "100.0 % when the images are scaled so that every channel has mean 0" in capsys.readouterr().err
    tell_scale(suspect, (images - images.mean()) / images.std(), labels)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("from_array", [True, False])
def test_order_of_numbered_classes_is_suggested_so_that_it_takes_effect(tmp_path: Path, from_array: bool) -> None:
    images, labels = bright_images()
    scaled, shifted = (images - images.mean()) / images.std(), np.array([1, 2, 0])[labels]
    names = [str(row) if from_array else f"{label}/{row}.png" for row, label in enumerate(shifted)]
    found = NamedLabelledImages(names, scaled.__getitem__, shifted)
    suspect = SuspectModel(Brightness(), depths=())
    with pytest.raises(DataError) as caught:
        check_order(suspect, scaled, found, force=False)
    if from_array:
        assert str(caught.value).endswith("labels = numpy.argsort([1,2,0])[labels]")
        check_order(
            suspect, scaled, NamedLabelledImages(names, found.read, np.argsort([1, 2, 0])[shifted]), force=False
        )
    else:
        assert str(caught.value).endswith("--class-names 1,2,0")


class Bytes(Brightness):
    """Takes pixels from 0 to 255."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images / 127.5 - 1)


def test_network_that_only_guesses_on_this_scale_is_told_of_the_right_one() -> None:
    images, labels = bright_images()
    unit = (images - images.min()) / (images.max() - images.min())
    found = NamedLabelledImages([str(row) for row in range(60)], unit.__getitem__, labels)
    with pytest.raises(DataError, match=r"only 33\.3 % .* guessing would, and 100\.0 % .* \[0, 255\]; .* 0 to 1\. "):
        check_order(SuspectModel(Bytes(), depths=()), unit, found, force=False)
    check_order(SuspectModel(Bytes(), depths=()), 255 * unit, found, force=False)


def test_classes_without_an_image_say_what_their_folders_hold(tmp_path: Path) -> None:
    for name in ("train/cat", "train/dog", "train/eel", "val/cat"):
        picture(tmp_path / name / "a.png")
    with pytest.raises(DataError, match=r"1 of .* 3 classes .*\(there are as many sub-folders below 'train', 'val' as"):
        check_classes(find_labelled(tmp_path), 3)
    found = find_labelled(tmp_path / "train")
    for number in range(4):
        (tmp_path / "train" / "fox").mkdir(exist_ok=True)
        (tmp_path / "train" / "fox" / f"{number}.heic").touch()
    found = find_labelled(tmp_path / "train")
    with pytest.raises(DataError, match=r"'fox'\. .*\(4 files .* no images by their names: fox/0\.heic, .*, \.\.\.\)"):
        check_classes(found, 4)


def test_picture_of_more_than_8_bits_is_not_said_to_be_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "cat" / "a.png")
    picture(tmp_path / "cat" / "b.png", mode="I;16")
    found = in_channels_taken(find_labelled(tmp_path), takes(1))
    assert capsys.readouterr().err == ""
    with pytest.raises(DataError, match="more than 8 bits per channel"):
        found.read(1)


def test_order_with_commas_in_names_is_suggested_as_a_file(tmp_path: Path) -> None:
    for folder in ("no, entry", "stop sign", "yield"):
        picture(tmp_path / folder / "a.png")
    images, labels = bright_images()
    found = find_labelled(tmp_path)
    found = NamedLabelledImages(found.names * 20, found.read, np.array([1, 2, 0])[labels], found.class_names)
    suspect = SuspectModel(Brightness(), depths=())
    with pytest.raises(DataError, match=r'FILE\.json that holds \["stop sign", "yield", "no, entry"\]$'):
        check_order(suspect, (images - images.mean()) / images.std(), found, force=False)


@pytest.mark.parametrize(
    "text",
    [
        "0 zebra\n1 no entry\n2 cat\n",
        "2\tcat\n0\tzebra\n1\tno entry\n",
        "id,name\n0,zebra\n1,no entry\n2,cat\n",
        "name;id\nno entry;1\nzebra;0\ncat;2\n",
        "names:\n  0: zebra\n  1: 'no entry'\n  2: cat\n",
        "1. zebra\n2. no entry\n3. cat\n",
        '"0","zebra"\n"1","no entry"\n"2","cat"\n',
        "0=zebra\n1=no entry\n2=cat",
    ],
)
def test_class_list_with_numbers_is_read_by_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    assert class_list(str(tmp_path / "classes.txt")) == ["zebra", "no entry", "cat"]


@pytest.mark.parametrize(
    "names",
    [
        ["20 km/h", "30 km/h", "50 km/h"],
        ["1 euro", "2 euro"],
        ["0 zebra", "2 cat", "3 dog"],
        ["0 zebra", "1 cat", "dog"],
        ["0", "1", "2"],
        ["3D", "2D"],
    ],
)
def test_class_names_that_hold_numbers_stay_as_they_are(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "classes.txt").write_text("\n".join(names))
    assert class_list(str(tmp_path / "classes.txt")) == names


def test_numbered_line_of_a_class_list_is_a_name_as_well(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("1 person\n2 people\n")
    names = class_list(str(tmp_path / "classes.txt"))
    assert labels_of(["1 person", "people"], ["1 person", "people"], names)[0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("list.csv", "it is neither a folder nor a .npz. Use"),
        ("images.npy", "it is neither a folder nor a .npz. Use"),
        ("a.png", "it is one image. Use"),
        ("clean.zip", "use"),
    ],
)
def test_file_that_is_no_labelled_set_says_what_it_is(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    message = str(without_labels(tmp_path / name))
    assert f"{name} has no labels: {kind} one sub-folder per class" in message
    assert message.endswith("Unpack it first.") == name.endswith(".zip")
