"""RoPE thetas of published long-context models, exactly as published.

Each was chosen by hand or by experiment for one base at a few lengths. No formula lies behind them,
so a preset answers for those bases and lengths only, and says for which when it is asked for
another; `critical` and `ntk` are there for the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from extend.errors import CompatibilityError, RecipeError
from extend.model_config import RopeSpec
from extend.rope.factors import check_plain, extension_factor


@dataclass(frozen=True, slots=True)
class Preset:
    """A published schedule.

    Attributes:
        base: theta and native length that training started from, with 128 rotated channels.
        thetas: length in tokens -> theta, the last one where several were trained at a length.
        note: what else there is to know, for messages.
    """

    base: tuple[float, int]
    thetas: Mapping[int, float]
    note: str = ""

    def apply(self, name: str, spec: RopeSpec, target_len: int) -> RopeSpec:
        """The published theta for `target_len`, from the base or an earlier length of it."""
        check_plain(spec)
        starts = {(self.thetas[length], length) for length in self.thetas} | {self.base}
        if (spec.rope_theta, spec.original_len) not in starts or spec.rotary_dim != 128:
            raise CompatibilityError(
                f"{name} was published for models of theta {self.base[0]:.10g}, native length "
                f"{self.base[1]} and 128 rotated channels, but this one has {spec.rope_theta:.10g}"
                f", {spec.original_len} and {spec.rotary_dim}; choose critical or ntk, or method "
                "theta with a value of your own")
        if extension_factor(spec, target_len) == 1:
            return spec
        if target_len not in self.thetas:
            known = ", ".join(f"{length} ({theta:.10g})" for length, theta in self.thetas.items()
                              if length > spec.original_len)
            raise RecipeError(
                f"{name} was not published for target length {target_len} from native length "
                f"{spec.original_len}; its lengths (and thetas) are {known or 'all shorter'}"
                f"{self.note and '. ' + self.note}; choose one of them, or method critical or ntk")
        return replace(spec, rope_theta=self.thetas[target_len], original_len=target_len)


def prolong(spec: RopeSpec, target_len: int) -> RopeSpec:
    """The thetas of ProLong, for Llama 3 8B.

    Raises:
        CompatibilityError: another base.
        RecipeError: another length.

    Source: Gao et al. 2024, arXiv:2410.02660; princeton-nlp/ProLong, train_64K.sh and
    train_512K.sh.
    """
    return PRESETS["prolong"].apply("prolong", spec, target_len)


def easycontext(spec: RopeSpec, target_len: int) -> RopeSpec:
    """The thetas of EasyContext, for Llama 2 7B; its lengths are 256000 and 512000, not 2^n.

    It trained 1e7 and 2.5e7 before 5e7 at 256000 tokens, and 1e8 before 2.5e8 at 512000. The theta
    for 1048576 was set in the config without training.

    Raises:
        CompatibilityError: another base.
        RecipeError: another length.

    Source: jzhang38/EasyContext, train_scripts/EasyContext-1M-Llama-2-7B.sh at 4c453b8.
    """
    return PRESETS["easycontext"].apply("easycontext", spec, target_len)


def lwm(spec: RopeSpec, target_len: int) -> RopeSpec:
    """The thetas of the Large World Model's text models, for Llama 2 7B.

    Raises:
        CompatibilityError: another base.
        RecipeError: another length.

    Source: Liu et al. 2024, arXiv:2402.08268; LargeWorldModel/LWM, README.md at ff5c413.
    """
    return PRESETS["lwm"].apply("lwm", spec, target_len)


def qwen2_5_1m(spec: RopeSpec, target_len: int) -> RopeSpec:
    """The theta that Qwen2.5-1M was trained with, for Qwen2.5.

    Raises:
        CompatibilityError: another base.
        RecipeError: another length.

    Source: Yang et al. 2025, arXiv:2501.15383; config.json of Qwen2.5-7B-Instruct-1M.
    """
    return PRESETS["qwen2.5-1m"].apply("qwen2.5-1m", spec, target_len)


PRESETS: dict[str, Preset] = {
    "prolong": Preset((5e5, 8192), {65536: 8e6, 524288: 1.28e8}),
    "easycontext": Preset((1e4, 4096), {32768: 1e6, 65536: 5e6, 256000: 5e7, 512000: 2.5e8,
                                        1048576: 1e9}),
    "lwm": Preset((1e4, 4096), {131072: 1e7, 262144: 1e7, 524288: 2.5e7, 1048576: 5e7}),
    "qwen2.5-1m": Preset((1e6, 32768), {262144: 1e7},
                         "It reads 1M tokens by dual chunk attention, not by its theta"),
}
