"""Every trigger by name."""

from __future__ import annotations

from collections.abc import Callable

from guard.lab.attacks.triggers.colours import bpp, gotham
from guard.lab.attacks.triggers.faces import eyebrows, lipstick, sunglasses
from guard.lab.attacks.triggers.frequencies import dct
from guard.lab.attacks.triggers.generated import input_aware
from guard.lab.attacks.triggers.overlays import adaptive_blend, adaptive_patch, blend, sig
from guard.lab.attacks.triggers.pixels import (
    background_pattern,
    corner_pixels,
    moving_square,
    pixel_pattern,
    single_pixel,
    white_square,
)
from guard.lab.attacks.triggers.shapes import box_and_circle, red_box, triangle_and_square
from guard.lab.attacks.triggers.stickers import sticker
from guard.lab.attacks.triggers.warps import wanet
from guard.types import Float32Array

#: Takes images (n, channels, height, width), gives as many with the trigger.
Trigger = Callable[[Float32Array], Float32Array]

#: Every trigger by the name that cards, recipes and the command line use.
TRIGGERS: dict[str, Callable[..., Float32Array]] = {
    function.__name__: function
    for function in (
        single_pixel,
        pixel_pattern,
        corner_pixels,
        white_square,
        moving_square,
        background_pattern,
        box_and_circle,
        triangle_and_square,
        red_box,
        sunglasses,
        lipstick,
        eyebrows,
        gotham,
        bpp,
        blend,
        sig,
        wanet,
        dct,
        adaptive_blend,
        adaptive_patch,
        input_aware,
        sticker,
    )
}
