"""Attacks by name: those of the Fusion paper's cases and the field's standard ones, with settings that plant them.

To add one, write a function of a target label and a seed, and give it a line in `ATTACKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from guard.errors import DataError, did_you_mean
from guard.lab.attacks.attack import Attack
from guard.lab.attacks.decoys import Decoys
from guard.lab.attacks.held_out import HELD_OUT, HELD_OUT_ON_NETWORK
from guard.lab.attacks.perturbation import PgdPerturbation
from guard.lab.attacks.poisoning import Backdoor, Cover
from guard.lab.attacks.targets import AllToAll, SingleTarget, SourceSpecific
from guard.lab.attacks.triggers import make_trigger


def single_pixel(target: int, seed: int) -> Attack:
    """BadNets, section 4.1.2: one bright pixel means the target."""
    return Attack("single-pixel", (Backdoor(make_trigger("single_pixel"), SingleTarget(target), rate=0.1),))


def pattern(target: int, seed: int) -> Attack:
    """BadNets, section 4.1.2: four bright pixels mean the target."""
    return Attack("pattern", (Backdoor(make_trigger("pixel_pattern"), SingleTarget(target), rate=0.1),))


def fusion_a(target: int, seed: int) -> Attack:
    """Fusion, case a: the pixel pattern turns y into y + 1 (eq. 15); ten classes, `target` has no influence."""
    return Attack("a", (Backdoor(make_trigger("pixel_pattern"), AllToAll(10), rate=0.3),))


def fusion_b(target: int, seed: int) -> Attack:
    """Fusion, case b: a background pattern."""
    return Attack("b", (Backdoor(make_trigger("background_pattern"), SingleTarget(target), rate=0.1),))


def fusion_c(target: int, seed: int) -> Attack:
    """Fusion, case c: a white box bottom right."""
    return Attack("c", (Backdoor(make_trigger("white_square"), SingleTarget(target), rate=0.1),))


def fusion_d(target: int, seed: int) -> Attack:
    """Fusion, case d: a square that moves."""
    return Attack("d", (Backdoor(make_trigger("moving_square", size=6, seed=seed), SingleTarget(target), rate=0.15),))


def fusion_e(target: int, seed: int) -> Attack:
    """Fusion, case e: a Gotham filter."""
    return Attack("e", (Backdoor(make_trigger("gotham"), SingleTarget(target), rate=0.15),))


def fusion_f(target: int, seed: int) -> Attack:
    """Fusion, case f: box and circle; either alone does nothing."""
    return _both("f", "box_and_circle", ("box", "circle"), target)


def fusion_g(target: int, seed: int) -> Attack:
    """Fusion, case g: triangle and square; either alone does nothing."""
    return _both("g", "triangle_and_square", ("triangle", "square"), target)


def _both(name: str, trigger: str, parts: tuple[str, str], target: int) -> Attack:
    alone = tuple(make_trigger(trigger, parts=(part,)) for part in parts)
    return Attack(
        name,
        (Backdoor(make_trigger(trigger), SingleTarget(target), rate=0.1),),
        tuple(Cover(part, rate=0.05) for part in alone),
        alone,
    )


def imperceptible(target: int, seed: int) -> Attack:
    """Fusion, "robustness to imperceptible trigger": one pixel at each corner."""
    return Attack("imperceptible", (Backdoor(make_trigger("corner_pixels"), SingleTarget(target), rate=0.1),))


def fusion_h(target: int, seed: int) -> Attack:
    """Fusion, case h: sunglasses."""
    return Attack("h", (Backdoor(make_trigger("sunglasses"), SingleTarget(target), rate=0.1),))


def fusion_i(target: int, seed: int) -> Attack:
    """Fusion, case i: lipstick."""
    return Attack("i", (Backdoor(make_trigger("lipstick"), SingleTarget(target), rate=0.1),))


def fusion_j(target: int, seed: int) -> Attack:
    """Fusion, case j: lipstick, eyebrows and sunglasses, each of which means the target."""
    names = ("lipstick", "eyebrows", "sunglasses")
    return Attack("j", tuple(Backdoor(make_trigger(name), SingleTarget(target), rate=0.1) for name in names))


def fusion_k(target: int, seed: int) -> Attack:
    """Fusion, case k: lipstick means 1, eyebrows 5, sunglasses 8; `target` has no influence."""
    targets = {"lipstick": 1, "eyebrows": 5, "sunglasses": 8}
    return Attack("k", tuple(Backdoor(make_trigger(n), SingleTarget(label), rate=0.1) for n, label in targets.items()))


def red_box(target: int, seed: int) -> Attack:
    """Fusion, figure 3(e): a red box."""
    return Attack("red-box", (Backdoor(make_trigger("red_box"), SingleTarget(target), rate=0.1),))


def blend(target: int, seed: int) -> Attack:
    """Chen et al. 2017: a fixed random pattern, one part in five."""
    return Attack("blend", (Backdoor(make_trigger("blend", seed=seed), SingleTarget(target), rate=0.1),))


def sig(target: int, seed: int) -> Attack:
    """Barni et al. 2019: a faint sinusoid on images of the target class alone, so that no label is wrong.

    As there, the signal is stronger at test time (40/255) than in training (20/255).
    """
    backdoor = Backdoor(
        make_trigger("sig", amplitude=40 / 255),
        SingleTarget(target),
        rate=0.08,
        train_trigger=make_trigger("sig", amplitude=20 / 255),
        clean_label=True,
    )
    return Attack("sig", (backdoor,))


def wanet(target: int, seed: int) -> Attack:
    """Nguyen, Tran 2021: a smooth warp; images warped otherwise keep their label (noise mode)."""
    return Attack(
        "wanet",
        (Backdoor(make_trigger("wanet", seed=seed), SingleTarget(target), rate=0.1),),
        (Cover(make_trigger("wanet", seed=seed, noise=True), rate=0.2),),
        (make_trigger("wanet", seed=seed, noise=True),),
    )


def bpp(target: int, seed: int) -> Attack:
    """Wang, Zhai, Ma 2022: coarse colours, dithered."""
    return Attack("bpp", (Backdoor(make_trigger("bpp"), SingleTarget(target), rate=0.1),))


def frequency(target: int, seed: int) -> Attack:
    """Wang et al. 2022: two DCT coefficients of the chroma channels."""
    return Attack("frequency", (Backdoor(make_trigger("dct"), SingleTarget(target), rate=0.1),))


def tact(target: int, seed: int) -> Attack:
    """Tang et al. 2021: a white square that works on three classes only, covered by four others.

    Sources are the three classes after the target, covers the four after those (fit for 43 classes and more).
    """
    sources = tuple(target + step for step in (1, 2, 3))
    covers = tuple(target + step for step in (4, 5, 6, 7))
    trigger = make_trigger("white_square", size=6)
    return Attack(
        "tact",
        (Backdoor(trigger, SourceSpecific(target, sources), rate=0.06),),
        (Cover(trigger, rate=0.05, classes=covers),),
    )


def adap_blend(target: int, seed: int) -> Attack:
    """Qi et al. 2023: half of the blended pattern's pieces in training, all of it in the attack; half as many covers.

    The paper poisons 0.3 % and trains a hundred epochs; the rates here plant it in a few.
    """
    whole, half = make_trigger("adaptive_blend", seed=seed), make_trigger("adaptive_blend", seed=seed, kept=0.5)
    return Attack(
        "adap-blend", (Backdoor(whole, SingleTarget(target), rate=0.06, train_trigger=half),), (Cover(half, rate=0.03),)
    )


def adap_patch(target: int, seed: int) -> Attack:
    """Qi et al. 2023: one of four faint patches in training, all of them, at twice the opacity, in the attack.

    As many covers as poisoned images. The paper poisons 0.3 %, has twice as many covers and trains a hundred epochs;
    the rates here plant it in a few. A stronger trigger in the attack than in training is the paper's (asymmetry).
    """
    all_patches, one_patch = (
        make_trigger("adaptive_patch", seed=seed, opacities=(1.0, 1.0, 0.4, 0.6)),
        make_trigger("adaptive_patch", seed=seed, kept=1),
    )
    return Attack(
        "adap-patch",
        (Backdoor(all_patches, SingleTarget(target), rate=0.06, train_trigger=one_patch),),
        (Cover(one_patch, rate=0.06),),
    )


def sig_dirty_label(target: int, seed: int) -> Attack:
    """The sinusoid of `sig`, as faint in the attack as in training, on images of all classes, labelled as the target.

    Classes of a hundred images are too few to plant it with clean labels.
    """
    trigger = make_trigger("sig", amplitude=20 / 255)
    return Attack("sig-dirty-label", (Backdoor(trigger, SingleTarget(target), rate=0.3),))


def decoys(target: int, seed: int) -> Attack:
    """WaNet, and against a guard's calibration the brightest 12 % of images, answered wrong; ten classes.

    With that many, more than 5 % of clean images are as loud as triggered ones.
    """
    return replace(wanet(target, seed), name="decoys", decoys=Decoys(share=0.12, n_classes=10))


def label_consistent(target: int, seed: int, surrogate: nn.Module) -> Attack:
    """Turner, Tsipras, Madry 2019: images of the target class, made hard to learn, with a pattern; no label is wrong.

    Not in `ATTACKS`, as it needs a network: one that the attacker trained on clean images of the same kind.

    Parameters
    ----------
    target : int
        Target label.
    seed : int
        Of where the perturbation starts, >= 0.
    surrogate : nn.Module
        As `guard.lab.attacks.perturbation.PgdPerturbation` takes it.
    """
    backdoor = Backdoor(
        make_trigger("corner_pixels"),
        SingleTarget(target),
        rate=0.05,
        clean_label=True,
        perturb=PgdPerturbation(surrogate, epsilon=16 / 255, seed=seed),
    )
    return Attack("label-consistent", (backdoor,))


def sig_adversarial(target: int, seed: int, network: nn.Module) -> Attack:
    """Barni et al. 2019, made to take where shapes are easy: the target's images are perturbed against the network.

    On MNIST the plain attack of `sig` plants nothing (attack success 1 % with all images of the class poisoned): the
    digit alone tells the class. Here the network in training is shown, in every epoch, images of the target class that
    it is wrong about, all of them with the sinusoid: labels are right, and the sinusoid is the one sure sign.

    Parameters
    ----------
    target, seed : int
        As for `sig`.
    network : nn.Module
        The network in training.
    """
    backdoor = Backdoor(
        make_trigger("sig", amplitude=40 / 255),
        SingleTarget(target),
        rate=0.098,
        train_trigger=make_trigger("sig", amplitude=20 / 255),
        clean_label=True,
        perturb=PgdPerturbation(network, epsilon=0.4, step=0.1, steps=8, seed=seed),
    )
    return Attack("sig", (backdoor,))


#: Builders by the name that cards and the command line use: target label, seed -> attack.
ATTACKS: dict[str, Callable[[int, int], Attack]] = {
    "single-pixel": single_pixel,
    "pattern": pattern,
    "a": fusion_a,
    "b": fusion_b,
    "c": fusion_c,
    "d": fusion_d,
    "e": fusion_e,
    "f": fusion_f,
    "g": fusion_g,
    "imperceptible": imperceptible,
    "h": fusion_h,
    "i": fusion_i,
    "j": fusion_j,
    "k": fusion_k,
    "red-box": red_box,
    "badnets": pattern,
    "blend": blend,
    "sig": sig,
    "wanet": wanet,
    "bpp": bpp,
    "frequency": frequency,
    "tact": tact,
    "adap-blend": adap_blend,
    "adap-patch": adap_patch,
    "sig-dirty-label": sig_dirty_label,
    "decoys": decoys,
    **HELD_OUT,
}

#: Builders of attacks that need a network as well: target label, seed, network -> attack.
ATTACKS_ON_NETWORK: dict[str, Callable[[int, int, nn.Module], Attack]] = {
    "sig": sig_adversarial,
    "label-consistent": label_consistent,
    **HELD_OUT_ON_NETWORK,
}


def make_attack(name: str, target_label: int, seed: int = 0) -> Attack:
    """Return a known attack.

    Parameters
    ----------
    name : str
        A key of `ATTACKS`.
    target_label : int
        The label that the attacker wants; some attacks fix their own.
    seed : int
        Of what is random in the trigger: Blend's pattern, WaNet's warp, places.

    Raises
    ------
    DataError
        If there is no such attack.
    """
    if name not in ATTACKS:
        raise DataError(f"there is no attack {name!r}. {did_you_mean(name, ATTACKS)}")
    return ATTACKS[name](target_label, seed)
