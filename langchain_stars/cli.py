"""The command line: `langchain-stars chat`, `demo`, `calibrate` and `benchmark`.

Knows arguments, terminals and what a reply says of itself. Each command is a function that takes
the parser of its arguments, adds them, and returns what runs it; models are imported when one runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import langchain_stars

if TYPE_CHECKING:
    from langchain_core.messages import BaseMessage

Run: TypeAlias = Callable[[argparse.Namespace], int]
"""Runs a command with its arguments, and returns its exit code."""

_PROGRAM = "langchain-stars"
_WRONG, _INTERRUPTED = 2, 130
_MAX_WIDTH = 96
_MARGIN = 9
_PATIENCE = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; return its exit code.

    It is 2 where something is wrong with what was asked for, which one line then says.
    """
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description="Chat with models whose replies are judged while they are made."
    )
    parser.add_argument("--version", action="version", version=langchain_stars.__version__)
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    for name, command in _COMMANDS.items():
        summary = (command.__doc__ or "").partition("\n")[0]
        of_command = commands.add_parser(name, help=summary, description=summary)
        of_command.set_defaults(run=command(of_command))
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # who read has gone; nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _expected_errors() as error:
        sys.stderr.write(f"{_PROGRAM}: {_visible(_in_a_line(error))}\n")
        return _WRONG


def _expected_errors() -> tuple[type[BaseException], ...]:
    """Return what a caller can do something about; anything else is a bug and shows where."""
    errors: list[type[BaseException]] = [ValueError, TypeError, OSError, ImportError, MemoryError]
    with contextlib.suppress(ImportError):
        from langchain_core.exceptions import LangChainException

        errors.append(LangChainException)
    for module, names in (
        ("langchain_stars.engine", ("EngineError",)),
        ("langchain_stars.decoder", ("GuardExhausted",)),
        ("langchain_stars.rewards.base", ("RewardError",)),
    ):
        if module in sys.modules:  # what was not imported cannot have been raised
            errors += [getattr(sys.modules[module], name) for name in names]
    return tuple(errors)


def _in_a_line(error: BaseException) -> str:
    """Return what an error says, without line breaks and without what pydantic adds."""
    details = getattr(error, "errors", None)
    if callable(details):
        with contextlib.suppress(Exception):
            first = details()[0]
            where = ".".join(str(part) for part in first["loc"])
            said = str(first["msg"]).removeprefix("Value error, ")
            return " ".join((f"`{where}`: {said}" if where else said).split())
    return " ".join(str(error).split()) or type(error).__name__


# Commands


def _chat(parser: argparse.ArgumentParser) -> Run:
    """Talk with a model, and see at which attempt each segment of a reply was kept."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="NAME", help="hub id or folder; the bundled one if not given"
    )
    model.add_argument("--device", help='as in "cpu" or "cuda"; the best there is if not given')
    model.add_argument("--dtype", help='as in "bfloat16"; the checkpoint\'s if not given')
    guard = parser.add_argument_group("guard", "the bundled rewards, if neither of these is given")
    guard.add_argument(
        "--reward",
        metavar="REWARD",
        help='objective: "helpfulness + 0.5 * sentiment", a hub id, a folder',
    )
    guard.add_argument(
        "--constraint",
        action="append",
        metavar="FLOOR",
        help='what must hold always, as in "safety >= 0.8"; may be given several times',
    )
    guard.add_argument(
        "--policy", metavar="FILE", help="thresholds that `calibrate` saved for this reward"
    )
    for name, kind, meaning in (
        ("target", float, "reward asked of a whole reply"),
        ("beta", float, "softness of acceptance, in reward units"),
        ("segment-size", int, "tokens judged at once"),
        ("max-attempts", int, "attempts of a segment"),
        ("holdback", int, "accepted segments that are not shown yet"),
    ):
        guard.add_argument(f"--{name}", type=kind, metavar="N", help=meaning)
    guard.add_argument(
        "--on-exhausted",
        choices=("fallback", "best", "refuse", "raise"),
        help="what happens when no attempt is accepted",
    )
    sampling = parser.add_argument_group("sampling")
    for name, kind, meaning in (
        ("temperature", float, "0 takes the likeliest token"),
        ("top-p", float, "share of probability kept"),
        ("max-tokens", int, "most tokens of a reply"),
        ("seed", int, "the same seed gives the same reply"),
    ):
        sampling.add_argument(f"--{name}", type=kind, metavar="N", help=meaning)
    route = parser.add_argument_group(
        "route", "the bundled safety reward judges the thread, if not given"
    )
    which = route.add_mutually_exclusive_group()
    which.add_argument("--guarded", action="store_true", help="guard every turn")
    which.add_argument("--fast", action="store_true", help="guard no turn")
    route.add_argument(
        "--floor",
        type=float,
        metavar="N",
        help="safety of the thread below which a turn is guarded",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the thread")
    parser.add_argument("--once", metavar="TEXT", help="answer this and end")
    return _run_chat


def _demo(parser: argparse.ArgumentParser) -> Run:
    """Show a guarded conversation with the bundled models: one turn fast, one guarded."""
    parser.add_argument(
        "--seed", type=int, default=7, metavar="N", help="another one shows other replies"
    )
    return _run_demo


def _benchmark(parser: argparse.ArgumentParser) -> Run:
    """Measure guarded decoding beside the plain decoder and its peers: one table, with its gates."""
    parser.add_argument(
        "--only",
        metavar="C1,C3",
        help="these rows: C on a CPU, G on a GPU, A with and without each optimisation; "
        "growth: the curves",
    )
    parser.add_argument("--json", metavar="PATH", help="where to save everything as JSON")
    parser.add_argument("--picture", metavar="PATH", help="where to save a picture")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="measure less, to see that it runs: minutes, not a quarter of an hour",
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="what seconds are; where others use the machine meanwhile, processor time is steadier",
    )
    return _run_benchmark


def _calibrate(parser: argparse.ArgumentParser) -> Run:
    """Measure what a reward gives a model's replies, and find thresholds at a stated cost."""
    parser.add_argument(
        "--model", metavar="NAME", help="hub id or folder; the bundled one if not given"
    )
    parser.add_argument(
        "--reward", metavar="REWARD", required=True, help="objective, as `chat` takes it"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        required=True,
        help='a prompt on each line, or a thread: {"messages": [{"role": ..., "content": ...}]}',
    )
    parser.add_argument("--save", metavar="FILE", help="where to write the policy, as JSON")
    parser.add_argument(
        "--mean-attempts",
        type=float,
        default=2.0,
        metavar="N",
        help="mean attempts of a segment: what the guard may cost (default: %(default)s)",
    )
    for name, default, meaning in (
        ("samples", 4, "replies to each prompt"),
        ("segment-size", 16, "tokens judged at once"),
        ("max-tokens", 128, "most tokens of a reply"),
        ("seed", 0, "decides the replies"),
    ):
        parser.add_argument(
            f"--{name}",
            type=int,
            default=default,
            metavar="N",
            help=f"{meaning} (default: %(default)s)",
        )
    parser.add_argument("--device", help='as in "cpu" or "cuda"; the best there is if not given')
    parser.add_argument("--dtype", help='as in "bfloat16"; the checkpoint\'s if not given')
    return _run_calibrate


_COMMANDS: dict[str, Callable[[argparse.ArgumentParser], Run]] = {
    "chat": _chat,
    "demo": _demo,
    "calibrate": _calibrate,
    "benchmark": _benchmark,
}
"""What can be run; the first line of each docstring is its summary."""


# What the commands do


def _run_chat(arguments: argparse.Namespace) -> int:
    screen = _Screen()
    with screen.waiting("starting"):
        app = _graph(arguments)
        thread = _Thread(app, system=arguments.system)
    if arguments.once is not None:
        _tell(screen, thread, arguments.once)
        return 0
    if sys.stdin.isatty():
        _greet(screen, arguments)
    with _typed_ahead():
        while _take_turn(screen, thread):
            pass
    if screen.is_terminal:
        screen.line()
    return 0


def _take_turn(screen: _Screen, thread: _Thread) -> bool:
    """Ask what the user says, and answer it; return whether the chat goes on."""
    asked = False
    try:
        text = _ask(screen)
        asked = True
        if text.strip():
            _tell(screen, thread, text)
            if screen.laid_out:
                screen.line()
    except EOFError:
        if asked:  # not of what is typed
            raise
        return False
    except KeyboardInterrupt:
        if not asked:
            screen.line()
        screen.paragraph("stopped" if asked else "Ctrl-D ends the chat.", "dim")
        if asked and screen.laid_out:
            screen.line()
    except _expected_errors() as error:
        if not sys.stdin.isatty():
            raise
        screen.paragraph(_in_a_line(error), "red")
        if screen.laid_out:
            screen.line()
    return True


def _ask(screen: _Screen) -> str:
    """Return what the user says next; raise EOFError when there is nothing more."""
    if not sys.stdin.isatty():
        return input()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it is what makes lines editable
    with _heard():
        screen.write("you".ljust(_MARGIN), "bold")
        # An empty prompt would let the line editor take the label for its own line and erase it.
        return input()


@contextlib.contextmanager
def _typed_ahead() -> Iterator[None]:
    """Keep whatever is typed for the prompt that comes next, as it was typed and in its order.

    Between prompts a terminal would edit lines itself: it would write them into replies, and take
    Ctrl-D for the end of a line. The editor of the prompts finds every key where there is one.
    """
    mode = _mode()
    if mode is None or not sys.stdout.isatty():  # then `input` leaves the editing to the terminal
        yield
        return
    try:
        import readline  # noqa: F401 - what edits the lines of `input`
    except ImportError:
        yield
        return
    import termios

    descriptor, before = mode
    keys = list(before[6])
    keys[termios.VMIN], keys[termios.VTIME] = 1, 0
    plain = [*before[:3], before[3] & ~(termios.ICANON | termios.ECHO), *before[4:6], keys]
    termios.tcsetattr(descriptor, termios.TCSANOW, plain)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Have an interrupt heard that comes when the wait for a key has all but begun.

    Python looks for one before it waits, and when one ends the wait; what comes between the two
    would be heard at the next key. So it is sent again until it has been heard.
    """
    waiting = threading.main_thread().ident
    if (
        waiting != threading.get_ident()
        or not hasattr(signal, "pthread_kill")
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    heard = threading.Event()
    hearing, telling = os.pipe()
    os.set_blocking(telling, False)

    def repeat() -> None:
        with open(hearing, "rb", buffering=0) as signals:
            while number := signals.read(1):
                while number[0] == signal.SIGINT and not heard.wait(_PATIENCE):
                    signal.pthread_kill(waiting, signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not heard.is_set():  # else it was sent again while it was being heard
            heard.set()
            signal.default_int_handler(number, frame)

    before = -1
    repeating = threading.Thread(target=repeat, name="stars-keyboard", daemon=True)
    try:
        signal.signal(signal.SIGINT, interrupt)
        before = signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
        repeating.start()
        yield
    finally:
        heard.set()
        signal.set_wakeup_fd(before)
        os.close(telling)
        if repeating.is_alive():
            repeating.join(_PATIENCE)  # before the next one is ended by what was meant for this
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _greet(screen: _Screen, arguments: argparse.Namespace) -> None:
    guard = " and ".join(filter(None, [arguments.reward, *(arguments.constraint or ())]))
    screen.paragraph(
        f"You talk with {arguments.model or 'the bundled model'}, guarded by "
        f"{guard or 'the bundled rewards'}. Ctrl-C ends a reply, Ctrl-D the chat."
    )
    if not arguments.model:
        screen.paragraph(_SMALL, "dim")
    _legend(screen)
    if screen.is_plain_for_want_of_rich:
        screen.paragraph(f"For colours: pip install '{_PROGRAM}[cli]'", "dim")
    screen.line()


_SMALL = "The bundled models are tiny: they show how guarding works, not how well a model can talk."


def _legend(screen: _Screen) -> None:
    painter = _Painter(screen)
    screen.write(" " * _MARGIN)
    painter.write("A raised number ends a segment, and is the attempt that was kept: ", "dim")
    for text, attempts, outcome in (
        ("the first", 1, "accepted"),
        ("a later one", 3, "accepted"),
        ("a late one", 8, "accepted"),
        ("a fallback", 20, "fallback"),
    ):
        painter.write(text, _style(attempts, outcome))
        painter.mark(_raised(attempts), "dim")
        painter.write(" ")
    painter.end()


def _run_benchmark(arguments: argparse.Namespace) -> int:
    from langchain_stars import benchmark

    return benchmark.main(
        only=arguments.only,
        json=arguments.json,
        picture=arguments.picture,
        quick=arguments.quick,
        clock=arguments.clock,
    )


def _run_demo(arguments: argparse.Namespace) -> int:
    screen = _Screen(laid_out=True)
    screen.line()
    screen.paragraph("A guarded conversation: trained weights, this machine, no network.", "bold")
    screen.paragraph(_SMALL, "dim")
    _legend(screen)
    with screen.waiting("loading the models"):
        from langchain_stars.chat_models import ChatStars
        from langchain_stars.guarded_chat import create_guarded_chat
        from langchain_stars.rewards import bundled

        _hush()
        safety = bundled.safety()
        guarded = ChatStars(
            reward=safety, constraints=[safety], max_tokens=64, seed=arguments.seed, **_STRICT
        )
        fast = guarded.unguarded()
        thread = _Thread(_compiled(create_guarded_chat(guarded=guarded, fast=fast)))
        safety.load()
    for text in _TURNS:
        screen.line()
        screen.paragraph(text, label="you", label_style="bold")
        turn = _tell(screen, thread, text)
    screen.line()
    _table(screen, turn)
    with screen.waiting("judging"):
        plain = fast.invoke(thread.said[:-1]).text
        ours, theirs = _judged(safety, _TURNS[-1], (turn.text, plain))
    screen.paragraph(
        f"Safety of this reply {ours:.2f}; of the one that the same seed gives without a guard, "
        f"{theirs:.2f}. What was streamed is the final message to the byte: "
        f"{'yes' if turn.text == turn.message else 'NO'}."
    )
    screen.line()
    program = _program()
    width = max(len(command) for command, _ in _NEXT) + len(program) + 3
    for number, (command, meaning) in enumerate(_NEXT):
        screen.write(("" if number else "next").ljust(_MARGIN), "bold")
        screen.write(f"{program} {command}".ljust(width))
        screen.line(meaning, "dim")
    screen.line()
    return 0 if turn.text == turn.message else 1


_STRICT: dict[str, Any] = {"target": 0.97, "alpha": 1.0, "beta": 0.01, "segment_size": 8}
"""Asks of every segment what few have, so that one sees what that takes."""

_TURNS = ("Hi! How was your weekend?", "How can I hurt my neighbour?")

_NEXT = (
    ("chat", "talk to it yourself"),
    ("chat --model Qwen/Qwen3-0.6B", "with a real model"),
    ("chat --help", "rewards, constraints"),
)


def _judged(reward: Any, prompt: str, replies: Sequence[str]) -> list[float]:
    """Return what a reward says of finished replies."""
    from langchain_stars.engine import engine_for
    from langchain_stars.rewards import Completion

    chat = [{"role": "user", "content": prompt}]
    engine = engine_for(reward.scorer.device)
    values = (
        engine.judge(reward, [chat], completion=Completion(text=text, finished=True))[0]
        for text in replies
    )
    return [float("nan") if value is None else value for value in values]


def _table(screen: _Screen, turn: _Turn) -> None:
    """Write how each segment of a guarded reply came to be kept."""
    segments, stars = turn.segments, turn.stars
    screen.paragraph("segment  attempt  tokens  safety  asked", "bold")
    for segment in segments:
        reward, threshold = segment["reward"], segment["threshold"]
        screen.paragraph(
            f"{segment['index'] + 1:>7}  {segment['attempts']:>7}  {segment['num_tokens'] or 'end':>6}  "
            f"{_number(reward):>6}  {_number(threshold):>5}"
            + ("  fallback" if segment["outcome"] == "fallback" else ""),
            _style(segment["attempts"], segment["outcome"]),
        )
    screen.line()
    screen.paragraph(
        f"{stars['num_drafted_tokens']} tokens were drafted and {stars['num_emitted_tokens']} kept. "
        f"The other {stars['num_drafted_tokens'] - stars['num_emitted_tokens']} were never shown: "
        "they are in no stream, no state and no log."
    )


def _run_calibrate(arguments: argparse.Namespace) -> int:
    screen = _Screen(laid_out=True)
    chats = _chats(arguments.prompts)
    if arguments.save and not os.path.isdir(os.path.dirname(arguments.save) or "."):
        raise ValueError(f"`--save` must name a file in a folder that is there: {arguments.save}")
    with screen.waiting("loading the models"):
        from langchain_stars.calibration import calibrate
        from langchain_stars.language_models import load_language_model
        from langchain_stars.rewards.bundled import FOLDER
        from langchain_stars.rewards.expressions import resolve_reward

        _hush()
        reward = resolve_reward(arguments.reward)
        reward.load()
        language_model = load_language_model(
            arguments.model or str(FOLDER / "language_model"),
            **_given(arguments, ("device", "dtype")),
        )
        language_model.load()
    with screen.counting("replies judged", len(chats) * arguments.samples) as counted:
        found = calibrate(
            language_model,
            reward,
            chats,
            mean_attempts=arguments.mean_attempts,
            segment_size=arguments.segment_size,
            max_tokens=arguments.max_tokens,
            num_samples=arguments.samples,
            seed=arguments.seed,
            progress=counted,
        )
    screen.paragraph("segment  replies    mean     5 %    50 %    95 %  threshold", "bold")
    for index, position in enumerate(found.positions):
        threshold = found.thresholds[index] if index < len(found.thresholds) else None
        columns = (position.mean, *(position.quantiles[place] for place in (0, 2, 4)))
        screen.paragraph(
            f"{index + 1:>7}  {position.num_replies:>7}"
            + "".join(f"{value:>8.3g}" for value in columns)
            + f"  {'' if threshold is None else format(threshold, '.3g'):>9}"
        )
    screen.line()
    screen.paragraph(
        f"With target {found.target:.4g} and beta {found.beta:.4g}, a segment takes about "
        f"{found.mean_attempts:.3g} attempts:"
    )
    names = {"model": arguments.model} if arguments.model else {}
    settings = names | {"reward": arguments.reward} | found.settings()
    written = (
        f"{name}={float(f'{value:.6g}') if isinstance(value, float) else value!r}"
        for name, value in settings.items()
    )
    screen.line(" " * _MARGIN + f"ChatStars({', '.join(written)})")
    if arguments.save:
        found.save(arguments.save)
        model = f" --model {shlex.quote(arguments.model)}" if arguments.model else ""
        screen.paragraph(f"Saved to {arguments.save}. To talk under it:")
        screen.line(
            " " * _MARGIN + f"{_program()} chat{model} --reward {shlex.quote(arguments.reward)} "
            f"--policy {shlex.quote(arguments.save)}"
        )
    return 0


def _chats(path: str) -> list[Any]:
    """Return the prompts of a file as chats; what it says is in no error."""
    from langchain_core.messages import convert_to_messages, convert_to_openai_messages

    chats: list[Any] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            prompt = line.strip()
            if not prompt:
                continue
            if not prompt.startswith("{"):
                chats.append([{"role": "user", "content": prompt}])
                continue
            try:
                messages = json.loads(prompt)["messages"]
                if not (isinstance(messages, list) and messages):
                    raise ValueError("no messages")
                messages = convert_to_messages(messages)
                chats.append(convert_to_openai_messages(messages, text_format="string"))
            except (KeyError, NotImplementedError, TypeError, ValueError):
                raise ValueError(
                    f"`--prompts` must hold `messages` in line {number} of {path}"
                ) from None
    if not chats:
        raise ValueError(f"`--prompts` must hold a prompt on each line, and {path} is empty")
    return chats


# Screens


class _Screen:
    """Writes to standard output: in colour and between margins on a terminal, plainly elsewhere.

    Attributes:
        is_terminal: Whether somebody looks at it.
        laid_out: Whether lines are broken between margins.
        width: Columns of a line.
    """

    def __init__(self, *, laid_out: bool = False) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # not every terminal has raised numbers
        self.is_terminal = sys.stdout.isatty()
        self.laid_out = laid_out or self.is_terminal
        self._console: Any = None
        self._status: Any = None
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                from rich.console import Console

                self._console = Console(highlight=False, soft_wrap=True)
        self.width = min(_MAX_WIDTH, shutil.get_terminal_size().columns)

    @property
    def is_plain_for_want_of_rich(self) -> bool:
        """Whether a terminal is there and the package that colours it is not."""
        return self.is_terminal and self._console is None

    def write(self, text: str, style: str = "") -> None:
        """Write text; what would command a terminal is shown as a mark."""
        text = _visible(text)
        if self._console is not None:
            from rich.text import Text

            self._console.print(Text(text, style=style), end="")
        else:
            sys.stdout.write(text)
            sys.stdout.flush()

    def line(self, text: str = "", style: str = "") -> None:
        """Write a line."""
        self.write(text + "\n", style)

    def paragraph(
        self, text: str, style: str = "", *, label: str = "", label_style: str = ""
    ) -> None:
        """Write words between the margins, with a label before the first line."""
        lines = textwrap.wrap(text, self.width - _MARGIN, break_on_hyphens=False) or [""]
        for number, each in enumerate(lines):
            self.write((label if not number else "").ljust(_MARGIN), label_style)
            self.line(each, style)

    @contextlib.contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[Iterable[Any]], Iterator[Any]]]:
        """Yield a function that passes things on, and show on a terminal how many they were."""

        def count(things: Iterable[Any]) -> Iterator[Any]:
            for done, thing in enumerate(things, start=1):
                yield thing
                if self._status is not None:
                    self._status.update(f"{done} of {total} {what}")

        with self.waiting(f"0 of {total} {what}"):
            yield count

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[Callable[[], None]]:
        """Show that something takes its time, until the function it yields is called."""
        status = self._console.status(text, spinner_style="dim") if self._console else None
        self._status = status
        if status is not None:
            status.start()

        def end() -> None:
            if status is not None:
                status.stop()
            self._status = None

        try:
            yield end
        finally:
            end()


class _Painter:
    """Writes a reply as it arrives, breaking lines between words; a word ends with a blank."""

    def __init__(self, screen: _Screen) -> None:
        self._screen = screen
        self._column = _MARGIN
        self._word: list[tuple[str, str]] = []

    def write(self, text: str, style: str = "") -> None:
        """Write more of the reply."""
        if not self._screen.laid_out:
            self._screen.write(text)
            return
        for char in text:
            if not char.isspace():
                self._add(char, style)
                continue
            self._end_word()
            if char == "\n":
                self._break()
            elif _MARGIN < self._column < self._screen.width:
                self._screen.write(" ", style)
                self._column += 1

    def mark(self, text: str, style: str) -> None:
        """Write a note right behind what was written; not where only the reply is wanted."""
        if self._screen.laid_out:
            self._add(text, style)
            self._end_word()  # it is shown now, though the word may go on

    def end(self) -> None:
        """Write what is left, and end the line."""
        self._end_word()
        self._screen.line()
        self._column = _MARGIN

    def _add(self, text: str, style: str) -> None:
        if self._word and self._word[-1][1] == style:
            self._word[-1] = (self._word[-1][0] + text, style)
        else:
            self._word.append((text, style))

    def _end_word(self) -> None:
        width = sum(_cells(text) for text, _ in self._word)
        if self._column > _MARGIN and self._column + width > self._screen.width:
            self._break()
        for text, style in self._word:
            self._screen.write(text, style)
        self._column += width
        self._word = []

    def _break(self) -> None:
        self._screen.line()
        self._screen.write(" " * _MARGIN)
        self._column = _MARGIN


_JOINERS = "\u200c\u200d"
"""Invisible, and part of how some languages and emoji are written."""


def _visible(text: str) -> str:
    """Return a text without what a terminal obeys or hides: escapes, directions, surrogates."""
    return "".join(
        "\ufffd"
        if char not in "\n\t" + _JOINERS and unicodedata.category(char) in ("Cc", "Cf", "Cs")
        else char
        for char in text
    )


def _cells(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _raised(number: int) -> str:
    return str(number).translate(_RAISED)


def _style(attempts: int, outcome: str) -> str:
    """Return the colour of a segment: the more attempts it took, the warmer."""
    if outcome == "fallback":
        return "red"
    return "green" if attempts == 1 else "cyan" if attempts < 5 else "yellow"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# Turns


@dataclass
class _Turn:
    """What became of a turn.

    Attributes:
        text: What was shown of the reply.
        message: The reply as it stands in the state.
        route: How it was answered.
        routing: Why.
        metadata: What the reply says of itself.
        seconds: How long it took.
    """

    text: str = ""
    message: str | None = None
    route: str = ""
    routing: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def stars(self) -> dict[str, Any]:
        """What a `ChatStars` says of its reply."""
        return dict(self.metadata.get("stars") or {})

    @property
    def segments(self) -> list[dict[str, Any]]:
        """The segments kept."""
        return list(self.stars.get("segments") or ())


class _Thread:
    """A thread of the guarded chat; a turn that is not answered leaves nothing in it."""

    def __init__(self, app: Any, *, system: str | None = None) -> None:
        self._app = app
        self._config: Any = {"configurable": {"thread_id": "1"}}
        self._system = system
        self.said: list[BaseMessage] = []

    def answer(self, text: str, show: _Show) -> _Turn:
        """Answer what the user says, and show the reply while it is made."""
        turn = _Turn()
        begin = time.monotonic()
        try:
            asyncio.run(self._stream(text, turn, show))
        except BaseException:
            self._forget(turn)
            raise
        finally:
            show.end()
            turn.seconds = time.monotonic() - begin
            self.said = self._app.get_state(self._config).values.get("messages", [])
        return turn

    async def _stream(self, text: str, turn: _Turn, show: _Show) -> None:
        messages: list[tuple[str, str]] = [("user", text)]
        if self._system is not None and not self.said:
            messages.insert(0, ("system", self._system))
        reply: str | None = None
        async for mode, part in self._app.astream(
            {"messages": messages}, self._config, stream_mode=["updates", "custom", "messages"]
        ):
            if mode == "updates":
                for update in filter(None, part.values()):
                    turn.route = update.get("route", turn.route)
                    turn.routing = update.get("routing", turn.routing)
                    if update.get("messages"):
                        [message] = update["messages"]
                        turn.message, turn.metadata = message.text, message.response_metadata
                if "route" in part:
                    show.route(turn.route)
            elif mode == "custom":
                show.segment(part["segment"], part["text"])
            elif part[0].text:
                if reply not in (None, part[0].id):  # what failed is said again by another model
                    turn.text = ""
                    show.again(turn.route)
                reply = part[0].id
                turn.text += part[0].text
                show.text(turn.text)

    def _forget(self, turn: _Turn) -> None:
        """Keep what was shown of a reply that was not finished, or drop its question."""
        from langchain_core.messages import AIMessage, RemoveMessage

        messages = self._app.get_state(self._config).values.get("messages", [])
        if len(messages) <= len(self.said):
            return
        change: BaseMessage = AIMessage(turn.text)
        if not turn.text:
            change = RemoveMessage(id=messages[-1].id)
        self._app.update_state(self._config, {"messages": [change]}, as_node="guarded")


class _Show:
    """Shows a reply while it is made: its route, its text, its segments."""

    def __init__(self, screen: _Screen, end_waiting: Callable[[], None]) -> None:
        self._screen = screen
        self._end_waiting = end_waiting
        self._painter = _Painter(screen)
        self._begun = False
        self._shown = 0

    def route(self, route: str) -> None:
        """Say who answers."""
        self._end_waiting()
        if self._screen.laid_out:
            self._screen.write(route.ljust(_MARGIN), f"bold {_COLOURS.get(route, '')}")
        self._begun = True

    def segment(self, segment: dict[str, Any], text: str) -> None:
        """Show a segment of a guarded reply, and at which attempt it was kept."""
        if segment["outcome"] == "unguarded":
            return
        self._shown += len(text)
        self._painter.write(text, _style(segment["attempts"], segment["outcome"]))
        # The end of the reply can be a segment of its own, and two numbers are not one.
        self._painter.mark(("" if text else " ") + _raised(segment["attempts"]), "dim")

    def text(self, text: str) -> None:
        """Show what of a reply is not shown yet: of a fast one all, else the refusal."""
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        self._painter.write(new, "")

    def again(self, route: str) -> None:
        """Begin the reply anew."""
        self._painter.end()
        self._shown = 0
        self.route(route)

    def end(self) -> None:
        """End the reply."""
        self._end_waiting()
        if self._begun and (self._screen.laid_out or self._shown):
            self._painter.end()


_COLOURS = {"guarded": "green", "fast": "blue"}


def _tell(screen: _Screen, thread: _Thread, text: str) -> _Turn:
    """Answer what the user says, and say how."""
    with _unechoed(), screen.waiting("thinking") as end_waiting:
        turn = thread.answer(text, _Show(screen, end_waiting))
    if screen.laid_out:
        screen.paragraph(" · ".join(filter(None, _notes(turn))), "dim")
    return turn


def _mode() -> tuple[int, list[Any]] | None:
    """Return the descriptor and the settings of the terminal that is typed at, where it is one."""
    try:
        import termios
    except ImportError:
        return None
    try:
        descriptor = sys.stdin.fileno()
        return descriptor, termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):
        return None


@contextlib.contextmanager
def _unechoed() -> Iterator[None]:
    """Keep what is typed while a reply is made from being written into it."""
    mode = _mode()
    if mode is None:
        yield
        return
    import termios

    descriptor, before = mode
    silent = before[:3] + [before[3] & ~termios.ECHO] + before[4:]
    termios.tcsetattr(descriptor, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def _notes(turn: _Turn) -> Iterator[str]:
    """Yield what is worth knowing of a turn."""
    yield _why(turn.routing)
    stars, segments = turn.stars, turn.segments
    if stars.get("guarded"):
        attempts = stars["num_attempts"]
        yield f"{_count(len(segments), 'segment')} in {_count(attempts, 'attempt')}"
        if turn.metadata.get("finish_reason") == "refusal":
            yield "refused: no attempt was good enough"
    num_tokens = (stars or {}).get("num_emitted_tokens", 0)
    if num_tokens:
        yield f"{_count(num_tokens, 'token')}, {num_tokens / max(turn.seconds, 1e-3):.0f}/s"


def _why(routing: dict[str, Any]) -> str:
    reason, reward, floor = (routing.get(key) for key in ("reason", "reward", "floor"))
    if reason == "sticky":
        left = _count(routing["turns_left"], "more turn")
        return f"an earlier turn was sensitive; {left} will be guarded"
    if reward is not None and floor is not None:
        return f"safety of the thread {reward:.2f} ({floor:.2f} is asked)"
    return _REASONS.get(str(reason), "")


_REASONS = {
    "failed": "the fast model failed",
    "unreadable": "in doubt: not text, too much of it, or letters that the router does not know",
    "unknown": "in doubt: the router named no route",
    "timeout": "in doubt: the router took too long",
    "error": "in doubt: the router failed",
}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# Models


def _graph(arguments: argparse.Namespace) -> Any:
    """Return the guarded chat that the arguments ask for."""
    from langchain_stars.chat_models import ChatStars
    from langchain_stars.guarded_chat import create_guarded_chat
    from langchain_stars.routing import safety_router

    _hush()
    settings = _given(arguments, _SETTINGS)
    if arguments.policy:
        settings = _policy(arguments) | settings
    if arguments.constraint:
        settings["constraints"] = arguments.constraint
    guarded = ChatStars(**settings)
    router: Any
    if arguments.guarded or arguments.fast:
        named = "guarded" if arguments.guarded else "fast"

        def router(messages: Any) -> str:
            return named
    else:
        router = safety_router(floor=arguments.floor)
    return _compiled(create_guarded_chat(guarded=guarded, fast=guarded.unguarded(), router=router))


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return those of some arguments that were given."""
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _policy(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the thresholds of a policy file, which hold for the reward that they were found for."""
    from langchain_stars.calibration import Calibration
    from langchain_stars.rewards.expressions import resolve_reward

    policy = Calibration.load(arguments.policy)
    if not arguments.reward:
        raise ValueError(f"`--policy` needs the `--reward` it was found for: {policy.reward}")
    reward = resolve_reward(arguments.reward)
    if reward.name != policy.reward:
        raise ValueError(f"`--policy` was found for {policy.reward}, and not for {reward.name}")
    if reward.fingerprint != policy.reward_fingerprint:
        raise ValueError(f"`--policy` was found for {policy.reward}, which has changed since")
    return policy.settings()


_SETTINGS = (
    "model",
    "device",
    "dtype",
    "reward",
    "target",
    "beta",
    "segment_size",
    "max_attempts",
    "holdback",
    "on_exhausted",
    "temperature",
    "top_p",
    "max_tokens",
    "seed",
)


def _compiled(graph: Any) -> Any:
    from langgraph.checkpoint.memory import InMemorySaver

    return graph.compile(checkpointer=InMemorySaver())


def _hush() -> None:
    """Keep what libraries say of their work off the screen; what goes wrong is told by us."""
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    of_transformers.set_verbosity_error()
    logging.getLogger("langchain_stars").addHandler(logging.NullHandler())


def _program() -> str:
    """Return what has to be typed to run this command again."""
    if shutil.which(_PROGRAM):
        return _PROGRAM
    path = os.path.join(os.path.dirname(sys.executable), _PROGRAM)
    return os.path.relpath(path) if os.path.exists(path) else _PROGRAM


if __name__ == "__main__":
    sys.exit(main())
