"""What the processes of a run tell each other: one small actor that the driver owns."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import ray

from specforge.errors import UserError
from specforge.logs import Lines, Records

NAMESPACE = "specforge"  # of the names of actors in the cluster
Line = tuple[str, str, str]  # the process that says it, its level, and the text


class Board:
    """Lines to print, the wanted number of producers, and whether the run is to stop.

    Args:
        producers: wanted number of producers.
    """

    def __init__(self, producers: int) -> None:
        self._lines: list[Line] = []
        self._producers, self._stops, self._refusal = producers, False, ""
        self._nodes: dict[str, str] = {}
        self._starts = 0  # of the trainers

    def say(self, line: Line) -> None:
        """Have the driver print a line."""
        self._lines.append(line)

    def joined(self, name: str, node: str) -> None:
        """Note the node on which a process has begun."""
        self._nodes[name] = node
        self._starts += name == "trainer 0"  # all ranks start together

    def nodes(self) -> dict[str, str]:
        """The node of each process that has begun."""
        return self._nodes

    def stop(self) -> None:
        """Have the trainers save and stop."""
        self._stops = True

    def stops(self) -> bool:
        """Whether the trainers are to stop."""
        return self._stops

    def refuse(self, reason: str) -> None:
        """End the run because of the user's mistake: trainers are not started again."""
        self._refusal, self._stops = self._refusal or reason, True

    def scale(self, producers: int) -> int:
        """Set the wanted number of producers; returns the previous one."""
        before, self._producers = self._producers, producers
        return before

    def read(self) -> tuple[list[Line], int, str, int]:
        """What is new for the driver.

        Returns:
            The lines since the last call, the wanted number of producers, the reason why the run ended, if any, and how
            often the trainers were started again.
        """
        lines, self._lines = self._lines, []
        return lines, self._producers, self._refusal, max(0, self._starts - 1)


def join(board: Any, name: str, folder: str, gpus: int) -> None:
    """Make this process part of a run: its output goes to the driver, and relative paths are the user's.

    Args:
        board: the run's board.
        name: what to print before each line.
        folder: the folder in which the user started the run.
        gpus: number of GPUs that the process was given.

    Raises:
        UserError: this node does not have the folder.
    """
    _say_to(board, name)
    board.joined.remote(name, ray.util.get_node_ip_address())
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        os.chdir(folder)
    except OSError as error:
        where = ray.util.get_node_ip_address()
        raise UserError(
            f"{folder}: cannot be used on {where} ({error}); launch from a folder that all nodes share"
        ) from error


def _say_to(board: Any, name: str) -> None:
    """Send what this process prints and logs to the driver."""

    def send(level: str, text: str) -> None:
        board.say.remote((name, level, text))

    sys.stdout, sys.stderr = Lines(send, "info"), Lines(send, "error")
    # Lightning keeps its messages to itself if it was imported before the root logger had a handler.
    for logger in (logging.root, *map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))):
        logger.propagate = True
        for handler in list(logger.handlers):  # Ray's print on stderr; its files stay
            if type(handler) is not logging.FileHandler and isinstance(handler, logging.StreamHandler):
                logger.removeHandler(handler)
    logging.root.addHandler(Records(send))
