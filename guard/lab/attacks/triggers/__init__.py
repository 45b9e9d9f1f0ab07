"""Triggers: pure functions that put an attacker's mark on images, and the dict that names them.

A trigger takes images in [0, 1], before any normalisation, and returns new ones; it never changes its input, and an
image gets the same result in any batch. To add one, write the function in the module that its kind belongs to, with its
source and exact parameters, and give it a line in `registry.TRIGGERS`.
"""

from guard.lab.attacks.triggers.checks import check_unit_images
from guard.lab.attacks.triggers.colours import bpp, gotham
from guard.lab.attacks.triggers.faces import eyebrows, lipstick, sunglasses
from guard.lab.attacks.triggers.frequencies import dct
from guard.lab.attacks.triggers.generated import input_aware
from guard.lab.attacks.triggers.named import NamedTrigger, make_trigger
from guard.lab.attacks.triggers.overlays import adaptive_blend, adaptive_patch, blend, sig
from guard.lab.attacks.triggers.pixels import (
    CORNER_PATTERN,
    SINGLE_PIXEL,
    background_pattern,
    corner_pixels,
    moving_square,
    pixel_pattern,
    single_pixel,
    white_square,
)
from guard.lab.attacks.triggers.registry import TRIGGERS, Trigger
from guard.lab.attacks.triggers.shapes import box_and_circle, red_box, triangle_and_square
from guard.lab.attacks.triggers.stickers import sticker
from guard.lab.attacks.triggers.warps import wanet

__all__ = [
    "CORNER_PATTERN",
    "SINGLE_PIXEL",
    "TRIGGERS",
    "NamedTrigger",
    "Trigger",
    "adaptive_blend",
    "adaptive_patch",
    "background_pattern",
    "blend",
    "box_and_circle",
    "bpp",
    "check_unit_images",
    "corner_pixels",
    "dct",
    "eyebrows",
    "gotham",
    "input_aware",
    "lipstick",
    "make_trigger",
    "moving_square",
    "pixel_pattern",
    "red_box",
    "sig",
    "single_pixel",
    "sticker",
    "sunglasses",
    "triangle_and_square",
    "wanet",
    "white_square",
]
