"""The dict that names every trigger."""

from __future__ import annotations

from collections.abc import Callable

from guard.attacks.triggers.blends import adaptive_blend, adaptive_patch, blend, sig
from guard.attacks.triggers.colours import bpp, gotham
from guard.attacks.triggers.faces import eyebrows, lipstick, sunglasses
from guard.attacks.triggers.frequencies import dct
from guard.attacks.triggers.pixels import (
    background_pattern,
    corner_pixels,
    moving_square,
    pixel_pattern,
    red_box,
    single_pixel,
    white_square,
)
from guard.attacks.triggers.shapes import box_and_circle, triangle_and_square
from guard.attacks.triggers.warps import wanet
from guard.types import Float32Array

#: Images -> new images with the attacker's mark.
Trigger = Callable[[Float32Array], Float32Array]

#: A trigger with its parameters still open: images first, then keywords, all with defaults.
TriggerFunction = Callable[..., Float32Array]

#: Every trigger by the name that recipes and the command line use.
TRIGGERS: dict[str, TriggerFunction] = {
    "single_pixel": single_pixel,
    "pixel_pattern": pixel_pattern,
    "background_pattern": background_pattern,
    "white_square": white_square,
    "moving_square": moving_square,
    "gotham": gotham,
    "box_and_circle": box_and_circle,
    "triangle_and_square": triangle_and_square,
    "corner_pixels": corner_pixels,
    "red_box": red_box,
    "sunglasses": sunglasses,
    "lipstick": lipstick,
    "eyebrows": eyebrows,
    "blend": blend,
    "sig": sig,
    "wanet": wanet,
    "bpp": bpp,
    "dct": dct,
    "adaptive_blend": adaptive_blend,
    "adaptive_patch": adaptive_patch,
}
