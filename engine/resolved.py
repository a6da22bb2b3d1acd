"""What an engine's options come to where its configuration leaves them open."""

from pallas_paged.engine.config import CPU_SCHEDULER_STEPS, EngineConfig


def resolve_num_scheduler_steps(config: EngineConfig, platform: str) -> int:
    """Returns the most decode steps in one program on devices of a platform."""
    if config.deterministic:
        return 1
    if config.num_scheduler_steps is None:
        return CPU_SCHEDULER_STEPS if platform == "cpu" else 1
    return config.num_scheduler_steps


def resolve_token_logprobs(config: EngineConfig) -> bool:
    """Returns whether plain steps have programs that give log-probabilities too."""
    if config.token_logprobs is None:
        return not config.compile_ahead and config.bundle is None
    return config.token_logprobs


def resolve_background_compilation(config: EngineConfig, platform: str) -> bool:
    """Returns whether programs are compiled in the background on devices of a platform."""
    if config.background_compilation is None:
        return platform == "cpu" and not config.deterministic
    return config.background_compilation


def resolve_cascade(config: EngineConfig, platform: str) -> bool:
    """Returns whether a prefix that many share is read for several of them at a time."""
    if config.disable_cascade_attn is None:
        return platform != "cpu" and not config.deterministic
    return not config.disable_cascade_attn and not config.deterministic
