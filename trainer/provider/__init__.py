"""DSPy-native fine-tuning: `OllamaProvider` for `dspy.LM`, and `at_least` for the traces that are kept."""

from trainer.provider.provider import OllamaProvider, TuningJob
from trainer.provider.rows import at_least

__all__ = ["OllamaProvider", "TuningJob", "at_least"]
