"""What every entry point is: a name, a manual, parameters, and what it does."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.config.parameters import Request


class Command(ABC):
    """An entry point, which is `-e NAME` of the MLflow project and `phi3-mlflow NAME`.

    Attributes:
        name: as in MLproject.
        parameters: the names of the parameters it takes, in the order of MLproject.
        choices: allowed values of parameters that depend on the command.
    """

    name: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @property
    def manual(self) -> str:
        """What `--help` shows: the docstring of the module that the command is written in."""
        return (sys.modules[type(self).__module__].__doc__ or "").strip()

    @property
    def summary(self) -> str:
        """The first line of the manual."""
        return self.manual.partition("\n")[0]

    @abstractmethod
    def run(self, request: Request) -> None:
        """Do it.

        Args:
            request: the profile and the parameters, checked.

        Raises:
            ProjectError: whatever goes wrong for a reason that a person can mend.
        """
