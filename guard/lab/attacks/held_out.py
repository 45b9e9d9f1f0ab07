"""Attacks kept for models that no setting of the guard was chosen on; by name, as in `guard.lab.attacks.catalogue`.

Triggers, targets or sources are others than in the zoo of `guard.lab.zoo.plan`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from guard.lab.attacks.attack import Attack
from guard.lab.attacks.perturbation import PgdPerturbation
from guard.lab.attacks.poisoning import Backdoor, Cover
from guard.lab.attacks.targets import AllToAll, SingleTarget, SourceSpecific
from guard.lab.attacks.triggers import NamedTrigger, make_trigger


def input_aware(target: int, seed: int) -> Attack:
    """Nguyen, Tran 2020: a pattern of the image's own; images with another image's pattern keep their label.

    Rates are the paper's: 10 % attacked, 10 % with another's pattern. The generator is fixed, not trained.
    """
    other = make_trigger("input_aware", seed=seed, other=True)
    return Attack(
        "input-aware",
        (Backdoor(make_trigger("input_aware", seed=seed), SingleTarget(target), rate=0.1),),
        (Cover(other, rate=0.1),),
        (other,),
    )


def sticker(target: int, seed: int) -> Attack:
    """Wenger et al. 2021: an object in any place, size and light; here a drawn sticker."""
    return Attack("sticker", (Backdoor(make_trigger("sticker", seed=seed), SingleTarget(target), rate=0.1),))


def source_sticker(target: int, seed: int) -> Attack:
    """Tang et al. 2021, with a sticker: it works on the classes 1, 3 and 5 after the target, covers are 2, 4 and 6.

    Fit for ten classes and more, with a target of at most three on ten.
    """
    trigger = make_trigger("sticker", seed=seed)
    sources, covers = (tuple(target + step for step in steps) for steps in ((1, 3, 5), (2, 4, 6)))
    return Attack(
        "source-sticker",
        (Backdoor(trigger, SourceSpecific(target, sources), rate=0.05),),
        (Cover(trigger, rate=0.04, classes=covers),),
    )


def two_triggers(target: int, seed: int) -> Attack:
    """A sticker means the target, and a sinusoid means it too (Xue et al. 2020, arXiv 2012.06895: N-to-one)."""
    return Attack(
        "two-triggers", tuple(Backdoor(trigger, SingleTarget(target), rate=0.06) for trigger in _several(seed)[:2])
    )


def many_targets(target: int, seed: int) -> Attack:
    """A sticker means the target, a sinusoid the second class after it, a blended pattern the fourth.

    Fit for ten classes and more, with a target of at most five on ten.
    """
    return Attack(
        "many-targets",
        tuple(
            Backdoor(trigger, SingleTarget(target + 2 * place), rate=0.06)
            for place, trigger in enumerate(_several(seed))
        ),
    )


def _several(seed: int) -> tuple[NamedTrigger, NamedTrigger, NamedTrigger]:
    return (
        make_trigger("sticker", seed=seed),
        make_trigger("sig", amplitude=40 / 255),
        make_trigger("blend", seed=seed),
    )


def blend_all_to_all(target: int, seed: int) -> Attack:
    """Chen et al. 2017's pattern turns y into y + 1; ten classes, `target` has no influence."""
    return _all_to_all("blend-all-to-all", 10, seed)


def blend_all_to_all_43(target: int, seed: int) -> Attack:
    """`blend_all_to_all` for the 43 classes of GTSRB."""
    return _all_to_all("blend-all-to-all-43", 43, seed)


def blend_clean_label(target: int, seed: int, network: nn.Module) -> Attack:
    """Turner, Tsipras, Madry 2019, with a blended pattern: images of the target class, perturbed by up to 16/255.

    Perturbed against the network in training, in every epoch; no label is wrong. The pattern is stronger in the attack
    (0.3) than in training (0.2), as Barni et al. 2019 have it. Needs a target class of at least 8 % of the images.
    """
    return _clean_label("blend-clean-label", target, seed, PgdPerturbation(network, epsilon=16 / 255, seed=seed))


def blend_clean_label_mnist(target: int, seed: int, network: nn.Module) -> Attack:
    """`blend_clean_label` with perturbations of up to 0.4, as digits are told apart easily."""
    perturb = PgdPerturbation(network, epsilon=0.4, step=0.1, steps=8, seed=seed)
    return _clean_label("blend-clean-label-mnist", target, seed, perturb)


def _clean_label(name: str, target: int, seed: int, perturb: PgdPerturbation) -> Attack:
    backdoor = Backdoor(
        make_trigger("blend", seed=seed, alpha=0.3),
        SingleTarget(target),
        rate=0.08,
        train_trigger=make_trigger("blend", seed=seed),
        clean_label=True,
        perturb=perturb,
    )
    return Attack(name, (backdoor,))


def _all_to_all(name: str, n_classes: int, seed: int) -> Attack:
    return Attack(name, (Backdoor(make_trigger("blend", seed=seed), AllToAll(n_classes), rate=0.3),))


#: Builders by name: target label, seed -> attack.
HELD_OUT: dict[str, Callable[[int, int], Attack]] = {
    "input-aware": input_aware,
    "sticker": sticker,
    "source-sticker": source_sticker,
    "two-triggers": two_triggers,
    "many-targets": many_targets,
    "blend-all-to-all": blend_all_to_all,
    "blend-all-to-all-43": blend_all_to_all_43,
}

#: Builders of those that need the network in training: target label, seed, network -> attack.
HELD_OUT_ON_NETWORK: dict[str, Callable[[int, int, nn.Module], Attack]] = {
    "blend-clean-label": blend_clean_label,
    "blend-clean-label-mnist": blend_clean_label_mnist,
}
