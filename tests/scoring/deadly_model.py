"""A chat model without weights; what it is asked to do it does: die, raise, or say its process."""

from __future__ import annotations

import os
import signal

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Deadly(PythonModel):
    _skip_type_hint_validation = True

    def predict(self, context, model_input, params=None):
        text = model_input["messages"].iloc[0][0]["content"]
        if "die" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "raise" in text:
            raise ValueError("as it was told")
        return {
            "choices": [{"message": {"content": text.upper()}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": os.getpid()},
        }


set_model(Deadly())
