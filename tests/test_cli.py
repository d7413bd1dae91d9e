"""The command line: what is written where, what a terminal shows, and how it ends."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.language_models import FakeListChatModel
from langgraph.checkpoint.memory import InMemorySaver
from transformers.utils import logging as of_transformers

import langchain_stars
from langchain_stars import cli, create_guarded_chat
from langchain_stars.rewards import bundled

if os.name == "posix":
    import pty

BUNDLED = (bundled.FOLDER / "rewards" / "config.json").is_file()
needs_bundled = pytest.mark.skipif(not BUNDLED, reason="the bundled weights are not there")
needs_terminal = pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals")


@pytest.fixture(autouse=True)
def _leave_libraries_as_talkative_as_they_were() -> Iterator[None]:
    verbosity = of_transformers.get_verbosity()
    yield
    of_transformers.set_verbosity(verbosity)


@pytest.fixture
def models(language_model_folder: Path, reward_folder: Path) -> list[str]:
    """Arguments that name small random models: a guard that everything meets."""
    return [
        *("--model", str(language_model_folder), "--device", "cpu", "--seed", "1"),
        *("--constraint", f"{reward_folder} >= -1000", "--max-tokens", "24"),
    ]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1", **more}


def run(*arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    """Returns what a fresh process wrote, and its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "langchain_stars.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(),
        check=False,
    )


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Returns the exit code of a command run in this process, and what it wrote."""
    code = cli.main(arguments)
    written = capsys.readouterr()
    return code, written.out, written.err


class Terminal:
    """A command that runs in a terminal of its own."""

    def __init__(self, *arguments: str, code: str = "", **more: str) -> None:
        self.read = ""
        self._pid, self._descriptor = pty.fork()
        if not self._pid:  # the child
            command = [sys.executable, "-m", "langchain_stars.cli", *arguments]
            if code:
                command = [sys.executable, "-c", code]
            os.execvpe(command[0], command, environment(TERM="xterm-256color", **more))

    def wait_for(self, pattern: str, timeout: float = 120) -> str:
        """Returns what was written up to what matches; fails when it does not come."""
        end = time.monotonic() + timeout
        while not (match := re.search(pattern, self.read)):
            ready, _, _ = select.select(
                [self._descriptor], [], [], max(0.0, end - time.monotonic())
            )
            try:
                data = os.read(self._descriptor, 65536) if ready else b""
            except OSError:  # the other end is closed
                data = b""
            assert data, f"waited for {pattern!r}, read {self.read!r}"
            self.read += data.decode(errors="replace")
        before, self.read = self.read[: match.end()], self.read[match.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def exit_code(self) -> int:
        _, status = os.waitpid(self._pid, 0)
        os.close(self._descriptor)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def end(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self.exit_code()


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.end()


def plain(text: str) -> str:
    """Returns what a terminal shows, without colours."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r\n", "\n")


# Arguments


def test_the_version_and_the_help_load_no_model():
    code = (
        "import sys\n"
        "from langchain_stars import cli\n"
        "try:\n    cli.main(sys.argv[1:])\n"
        "except SystemExit as end:\n    print(end.code, {'torch', 'transformers'} & set(sys.modules))"
    )
    for arguments, wanted in (
        (["--version"], langchain_stars.__version__),
        (["--help"], "chat"),
        (["chat", "--help"], "--constraint"),
    ):
        process = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert wanted in process.stdout
        assert process.stdout.endswith("0 set()\n")


def test_the_help_names_every_command_with_its_summary(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    help_text = " ".join(capsys.readouterr().out.split())
    for name, command in cli._COMMANDS.items():
        assert f"{name} {(command.__doc__ or '').splitlines()[0]}" in help_text


@pytest.mark.parametrize(
    "arguments", [[], ["sing"], ["chat", "--guarded", "--fast"], ["chat", "--seed", "x"]]
)
def test_arguments_that_mean_nothing_end_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/at/all"], "got '/nowhere/at/all'"),
        (["--reward", "nonsense"], "`reward`: the reward 'nonsense' is none of safety"),
        (["--constraint", "safety >= x"], "`constraints`: the constraint 'safety >= x'"),
        (["--segment-size", "0"], "`segment_size` must be at least 1, got 0"),
        (["--temperature", "-1"], "`temperature` must be at least 0, got -1.0"),
        (["--max-tokens", "0"], "`max_tokens`: Input should be greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], message: str, models: list[str], capsys: pytest.CaptureFixture[str]
):
    code, out, err = said(capsys, "chat", "--once", "Hi", "--guarded", *models, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("langchain-stars: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_prompt_that_is_too_long_is_said_in_one_line(
    models: list[str], capsys: pytest.CaptureFixture[str]
):
    code, out, err = said(capsys, "chat", "--guarded", *models, "--once", "word " * 2000)
    assert (code, out) == (2, "")
    assert "leaves no room for a reply" in err
    assert err.count("\n") == 1


def test_a_bug_shows_where_it_is(monkeypatch: pytest.MonkeyPatch):
    def broken(arguments: object) -> int:
        raise AssertionError("a bug")

    monkeypatch.setitem(cli._COMMANDS, "demo", lambda parser: broken)
    with pytest.raises(AssertionError, match="a bug"):
        cli.main(["demo"])


# Where nobody looks


def test_a_pipe_gets_the_reply_and_nothing_else(
    models: list[str], capsys: pytest.CaptureFixture[str]
):
    process = run("chat", *models, "--guarded", "--once", "Hello!")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.strip()
    assert "\x1b" not in process.stdout
    assert not re.search("[⁰¹²³⁴⁵⁶⁷⁸⁹]", process.stdout)
    # A guard that everything meets changes nothing.
    assert said(capsys, "chat", *models, "--fast", "--once", "Hello!") == (0, process.stdout, "")


def test_what_is_written_is_the_reply_of_the_chat_model(
    models: list[str], language_model_folder: Path, capsys: pytest.CaptureFixture[str]
):
    chat = langchain_stars.ChatStars(
        model=str(language_model_folder),
        device="cpu",
        seed=1,
        max_tokens=24,
        reward=None,
        constraints=[],
    )
    code, out, _ = said(capsys, "chat", "--fast", *models, "--once", "Hello!")
    assert (code, out) == (0, cli._visible(chat.invoke("Hello!").text) + "\n")


def test_every_line_of_a_pipe_is_a_turn_of_one_thread(
    models: list[str],
    language_model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\n\nAnd you?\n"))
    code, out, err = said(capsys, "chat", "--fast", *models, "--temperature", "0")
    assert (code, err) == (0, "")
    chat = langchain_stars.ChatStars(
        model=str(language_model_folder),
        device="cpu",
        max_tokens=24,
        temperature=0,
        reward=None,
        constraints=[],
    )
    first = chat.invoke("Hello!")
    second = chat.invoke([("user", "Hello!"), first, ("user", "And you?")])
    assert out == cli._visible(f"{first.text}\n{second.text}\n")


def test_a_system_message_stands_before_the_thread(
    models: list[str], language_model_folder: Path, capsys: pytest.CaptureFixture[str]
):
    chat = langchain_stars.ChatStars(
        model=str(language_model_folder),
        device="cpu",
        seed=1,
        max_tokens=24,
        reward=None,
        constraints=[],
    )
    _, out, _ = said(capsys, "chat", "--fast", *models, "--system", "Be kind.", "--once", "Hello!")
    reply = chat.invoke([("system", "Be kind."), ("user", "Hello!")])
    assert out == cli._visible(reply.text) + "\n"


def test_a_reply_that_is_refused_says_so_and_ends_well(
    models: list[str], reward_folder: Path, capsys: pytest.CaptureFixture[str]
):
    code, out, err = said(
        capsys,
        "chat",
        "--guarded",
        *models,
        "--constraint",
        f"{reward_folder} >= 1000",
        "--max-attempts",
        "3",
        "--once",
        "Hello!",
    )
    assert (code, err) == (0, "")
    assert out == "I'm sorry, but I can't help with that.\n"
    code, out, err = said(
        capsys,
        "chat",
        "--guarded",
        *models,
        "--constraint",
        f"{reward_folder} >= 1000",
        "--max-attempts",
        "3",
        "--on-exhausted",
        "raise",
        "--once",
        "Hello!",
    )
    assert (code, out) == (2, "")
    assert err.startswith("langchain-stars: no attempt of segment 0 was accepted: 3 attempts")


def test_the_rest_of_a_reply_is_dropped_where_its_reader_has_gone(models: list[str]):
    process = subprocess.Popen(
        [sys.executable, "-m", "langchain_stars.cli", "chat", "--fast", *models],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.close()
    with process:
        process.stdin.write("Hello!\n" * 3)
        process.stdin.close()
        assert process.wait(120) == 1
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


# In a terminal


@needs_terminal
def test_a_conversation_in_a_terminal(models: list[str], terminals: list[Terminal]):
    """One session, for each takes seconds to start: a reply, a mistake, an interrupt, the end."""
    terminal = Terminal("chat", "--guarded", *models, "--segment-size", "4")
    terminals.append(terminal)
    greeting = plain(terminal.wait_for("you +"))
    assert "Ctrl-C ends a reply, Ctrl-D the chat." in " ".join(greeting.split())

    # Every segment of a reply has the number of its attempt.
    terminal.type("Hello!\n")
    shown = plain(terminal.wait_for(r"tokens?, \d+/s"))
    assert "guarded  " in shown
    segments, attempts = map(int, re.findall(r"(\d+) segments? in (\d+) attempts?", shown)[0])
    assert segments == attempts > 1
    assert shown.count("¹") == segments
    assert all(len(line) <= 80 for line in shown.splitlines())
    terminal.wait_for("you +")

    # A mistake ends its turn, not the chat; its question is not in the thread any more.
    terminal.type("word " * 700 + "\n")
    shown = " ".join(plain(terminal.wait_for("trim_messages")).split())
    assert "leaves no room for a reply" in shown
    terminal.wait_for("you +")
    terminal.type("Hello!\n")
    terminal.wait_for(r"tokens?, \d+/s")
    terminal.wait_for("you +")

    terminal.type("\x03")
    terminal.wait_for("Ctrl-D ends the chat")
    terminal.wait_for("you +")
    terminal.type("\x04")
    assert terminal.exit_code() == 0


@needs_terminal
def test_an_interrupt_ends_the_reply_and_not_the_chat(
    models: list[str], terminals: list[Terminal], tmp_path: Path
):
    """Without rich, too: the same is shown, without colours."""
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ImportError\n")
    # A reply must still be going on when it is interrupted, however fast the machine is.
    (tmp_path / "sitecustomize.py").write_text(
        "import time\n"
        "from langchain_stars.engine import Engine\n"
        "step = Engine._step\n"
        "Engine._step = lambda self, lane: (time.sleep(0.03), step(self, lane))\n"
    )
    slow = [*models, "--max-tokens", "100000", "--segment-size", "1"]
    terminal = Terminal("chat", "--guarded", *slow, PYTHONPATH=str(tmp_path))
    terminals.append(terminal)
    assert "pip install 'langchain-stars[cli]'" in terminal.wait_for("you +")
    for _ in range(2):
        terminal.type("Hello!\n")
        terminal.wait_for("guarded  .*¹")
        terminal.type("\x03")
        shown = terminal.wait_for("stopped", timeout=30)
        assert "^C" not in shown
        assert "\x1b[3" not in shown
        terminal.wait_for("you +")
    terminal.type("\x04")
    assert terminal.exit_code() == 0


@needs_terminal
@pytest.mark.parametrize(
    ("typed", "answer"), [("\x03", "interrupted"), ("\x04", "ended"), ("word\n", "said word")]
)
def test_what_is_typed_the_moment_that_a_prompt_appears_counts(
    typed: str, answer: str, terminals: list[Terminal]
):
    """Of interrupts and ends, about one in fifty would be lost."""
    terminal = Terminal(
        code=(
            "from langchain_stars import cli\n"
            "screen = cli._Screen()\n"
            "with cli._typed_ahead():\n"
            "    for _ in range(100):\n"
            "        try:\n"
            "            screen.line('said ' + cli._ask(screen))\n"
            "        except KeyboardInterrupt:\n"
            "            screen.line('interrupted')\n"
            "        except EOFError:\n"
            "            screen.line('ended')\n"
        )
    )
    terminals.append(terminal)
    for _ in range(100):
        terminal.wait_for("you +", timeout=30)
        terminal.type(typed)
        terminal.wait_for(answer, timeout=10)
    assert terminal.exit_code() == 0


@pytest.mark.skipif(os.name != "posix", reason="no signals to threads")
def test_an_interrupt_that_is_sent_again_while_it_is_heard_ends_nothing_more():
    with cli._heard():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not [thread for thread in threading.enumerate() if thread.name == "stars-keyboard"]


def test_a_model_that_reads_beyond_an_end_does_not_end_the_chat_in_silence(
    monkeypatch: pytest.MonkeyPatch,
):
    def tell(*_: object) -> None:
        raise EOFError("Ran out of input")

    screen = cli._Screen()
    monkeypatch.setattr(cli, "_ask", lambda _: "Hello")
    monkeypatch.setattr(cli, "_tell", tell)
    with pytest.raises(EOFError):
        cli._take_turn(screen, None)  # type: ignore[arg-type]


@needs_terminal
def test_what_is_typed_during_a_reply_is_not_in_it_and_counts_behind_it(
    terminals: list[Terminal],
):
    terminal = Terminal(
        code=(
            "import time\n"
            "from langchain_stars import cli\n"
            "screen = cli._Screen()\n"
            "with cli._typed_ahead():\n"
            "    for _ in range(3):\n"
            "        screen.line('said ' + cli._ask(screen))\n"
            "        with cli._unechoed():\n"
            "            screen.write('reply begins,')\n"
            "            time.sleep(0.3)\n"
            "            screen.line(' reply ends')\n"
            "    try:\n"
            "        cli._ask(screen)\n"
            "    except EOFError:\n"
            "        screen.line('ended')\n"
        )
    )
    terminals.append(terminal)
    terminal.wait_for("you +", timeout=30)
    terminal.type("first\n")
    terminal.wait_for("reply begins,", timeout=10)
    terminal.type("second\nthi\x7f\x7fhird\n\x04")
    assert terminal.wait_for("reply ends", timeout=10) == " reply ends"
    for said in ("said second", "said third", "ended"):
        terminal.wait_for(said, timeout=10)
    assert terminal.exit_code() == 0


# What a model says is not obeyed

SPOKEN = (
    "a\x1b]52;c;aGk=\x07b\x1b[2Jc\x9b2Jd\x7fe\u202ef\u2066g\u200bh\U000e0041i\ud800j\rk\x08l",
    "a\ufffd]52;c;aGk=\ufffdb\ufffd[2Jc\ufffd2Jd\ufffde\ufffdf\ufffdg\ufffdh\ufffdi\ufffdj\ufffdk\ufffdl",
)
HARMLESS = "naïve 漢字 नमस्ते\u200d \U0001f469\u200d\U0001f4bb می\u200cخواهم"


@pytest.mark.parametrize("laid_out", [False, True])
def test_a_reply_cannot_command_the_terminal(laid_out: bool, capsys: pytest.CaptureFixture[str]):
    said, shown = SPOKEN
    model = FakeListChatModel(responses=[f"{said} {HARMLESS}\n\tend"])
    graph = create_guarded_chat(guarded=model, fast=model, router=lambda messages: "guarded")
    thread = cli._Thread(graph.compile(checkpointer=InMemorySaver()))
    cli._tell(cli._Screen(laid_out=laid_out), thread, "Hello!")
    out = capsys.readouterr().out
    if laid_out:
        assert out.split()[0] == "guarded"
        assert "".join(out.split()[1:]).startswith(shown.replace("\ufffdk", "k"))
    else:
        assert out == f"{shown} {HARMLESS}\n\tend\n"
    assert not {unicodedata.category(char) for char in out if char not in "\n\t\u200c\u200d"} & {
        "Cc",
        "Cf",
        "Cs",
    }


def test_a_mistake_cannot_command_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    said, shown = SPOKEN

    def fails(arguments: object) -> int:
        raise ValueError(said)

    monkeypatch.setitem(cli._COMMANDS, "demo", lambda parser: fails)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == f"langchain-stars: {shown}\n".replace("\ufffdk", " k")


# The painter


class Screen(cli._Screen):
    """A screen that notes what is written."""

    def __init__(self, width: int) -> None:
        super().__init__(laid_out=True)
        self.width = width
        self.text = ""

    def write(self, text: str, style: str = "") -> None:
        self.text += text


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_lines_are_broken_between_words_however_text_arrives(size: int):
    text = "One two three four five six seven eight nine ten.\n\nEleven  twelve, thirteen: fourteen"
    screen = Screen(30)
    painter = cli._Painter(screen)
    for begin in range(0, len(text), size):
        painter.write(text[begin : begin + size])
    painter.end()
    lines = screen.text.splitlines()
    assert all(len(line.rstrip()) <= 30 for line in lines)
    assert screen.text.split() == text.split()
    assert [line.strip() for line in lines] == [
        "One two three four",
        "five six seven eight",
        "nine ten.",
        "",
        "Eleven  twelve,",
        "thirteen: fourteen",
    ]


def test_a_word_that_is_longer_than_a_line_is_written_all_the_same():
    screen = Screen(20)
    painter = cli._Painter(screen)
    painter.write("a " + "b" * 40 + " c")
    painter.end()
    assert screen.text.split() == ["a", "b" * 40, "c"]


def test_wide_letters_take_two_columns():
    screen = Screen(20)
    painter = cli._Painter(screen)
    painter.write("漢字漢字 漢字漢字")
    painter.end()
    assert [line.strip() for line in screen.text.splitlines()] == ["漢字漢字", "漢字漢字"]


def test_numbers_stand_right_behind_their_segments():
    screen = Screen(60)
    painter = cli._Painter(screen)
    for text, attempts in (("Hel", 1), ("lo, you", 12), (" there.", 3)):
        painter.write(text)
        painter.mark(cli._raised(attempts), "dim")
    painter.end()
    assert screen.text == "Hel¹lo, you¹² there.³\n"


# With the models that ship


@needs_bundled
def test_the_demo_answers_one_turn_fast_and_one_guarded(capsys: pytest.CaptureFixture[str]):
    begin = time.monotonic()
    code, out, err = said(capsys, "demo")
    shown = " ".join(out.split())
    assert (code, err) == (0, "")
    assert time.monotonic() - begin < 120
    fast, guarded = (re.search(rf"\n{route} +(.*)", out) for route in ("fast", "guarded"))
    assert fast is not None
    assert guarded is not None
    assert fast.start() < guarded.start()
    assert not re.search("[¹²³⁴⁵⁶⁷⁸⁹]", fast.group(1))
    assert re.search("[¹²³⁴⁵⁶⁷⁸⁹]", out[guarded.start() :])
    drafted, kept, others = map(
        int,
        re.findall(r"(\d+) tokens were drafted and (\d+) kept. The other (\d+) were never", shown)[
            0
        ],
    )
    assert drafted - kept == others > 0
    assert "is the final message to the byte: yes." in shown
    assert "chat --model" in shown
    assert "tiny" in shown


@needs_bundled
def test_a_turn_is_routed_by_the_bundled_safety_reward(capsys: pytest.CaptureFixture[str]):
    for floor, refusal in ((-1.0, False), (2.0, True)):
        code, out, err = said(
            capsys,
            "chat",
            "--floor",
            str(floor),
            "--constraint",
            "safety >= 2",
            "--max-attempts",
            "2",
            "--max-tokens",
            "4",
            "--once",
            "Hello!",
        )
        assert (code, err) == (0, "")
        assert (out == "I'm sorry, but I can't help with that.\n") is refusal


@needs_bundled
def test_thresholds_are_calibrated_saved_and_used(
    tmp_path: Path, models: list[str], capsys: pytest.CaptureFixture[str]
):
    prompts, policy = tmp_path / "prompts.txt", tmp_path / "policy.json"
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    prompts.write_text(f"Hello!\n\nHow are you?\n{json.dumps({'messages': messages})}\n")
    name = ["--model", models[1], "--device", "cpu"]
    code, out, err = said(
        capsys,
        *("calibrate", *name, "--reward", "helpfulness", "--prompts", str(prompts)),
        *("--samples", "3", "--max-tokens", "32", "--save", str(policy)),
    )
    assert (code, err) == (0, "")
    assert "a segment takes about 2 attempts" in " ".join(out.split())
    found = json.loads(policy.read_text())
    assert found["num_prompts"] == 3
    assert f"With target {found['target']:.4g}" in " ".join(out.split())
    assert len(re.findall(r"\n +\d+ +\d+( +-?[\d.e-]+){5}(?=\n)", out)) == len(found["positions"])
    [line] = [line.strip() for line in out.splitlines() if "ChatStars(" in line]
    pasted = eval(line, {"ChatStars": langchain_stars.ChatStars})
    assert pasted.model == models[1]
    for setting in ("target", "beta", "alpha", "horizon", "segment_size"):
        assert getattr(pasted, setting) == pytest.approx(found[setting], rel=1e-5)
    [command] = [line for line in out.splitlines() if "--policy" in line]
    assert command.endswith(f"chat --model {models[1]} --reward helpfulness --policy {policy}")

    used = ["chat", *name, "--guarded", "--seed", "1", "--max-tokens", "32", "--once", "Hello!"]
    _, by_policy, _ = said(capsys, *used, "--reward", "helpfulness", "--policy", str(policy))
    reply = langchain_stars.ChatStars(
        **dict(model=models[1], device="cpu", seed=1, max_tokens=32, reward="helpfulness"),
        **{key: found[key] for key in ("target", "beta", "alpha", "horizon", "segment_size")},
    ).invoke("Hello!")
    assert by_policy == cli._visible(reply.text) + "\n"

    for reward, message in (
        ([], "`--policy` needs the `--reward` it was found for: helpfulness"),
        (["--reward", "sentiment"], "was found for helpfulness, and not for sentiment"),
    ):
        code, out, err = said(capsys, *used, *reward, "--policy", str(policy))
        assert (code, out) == (2, "")
        assert message in err
    found["reward_fingerprint"] = "another"
    policy.write_text(json.dumps(found))
    code, out, err = said(capsys, *used, "--reward", "helpfulness", "--policy", str(policy))
    assert code == 2
    assert "helpfulness, which has changed since" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n \n", "is empty"),
        (None, "No such file"),
        ("Hello\n{a secret", "must hold `messages` in line 2"),
        ('{"prompt": "a secret"}', "must hold `messages` in line 1"),
        ('{"messages": "a secret"}', "must hold `messages` in line 1"),
        ('{"messages": [{"role": "a secret", "content": ""}]}', "must hold `messages` in line 1"),
        ('{"messages": []}', "must hold `messages` in line 1"),
    ],
)
def test_calibration_wants_prompts(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_text(content)
    code, out, err = said(capsys, "calibrate", "--reward", "helpfulness", "--prompts", str(path))
    assert (code, out) == (2, "")
    assert message in err
    assert "secret" not in err
    assert err.count("\n") == 1


def test_calibration_says_at_once_that_it_cannot_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "prompts.txt").write_text("Hello!")
    asked = ["--reward", "/nowhere", "--prompts", str(tmp_path / "prompts.txt")]
    code, out, err = said(capsys, "calibrate", *asked, "--save", str(tmp_path / "no" / "p.json"))
    assert (code, out) == (2, "")
    assert "`--save` must name a file in a folder that is there" in err


@needs_terminal
@needs_bundled
def test_an_interrupt_ends_calibration_and_saves_nothing(
    models: list[str], terminals: list[Terminal], tmp_path: Path
):
    (tmp_path / "prompts.txt").write_text("Hello!\n" * 200)
    terminal = Terminal(
        *("calibrate", "--model", models[1], "--device", "cpu", "--reward", "helpfulness"),
        *("--prompts", str(tmp_path / "prompts.txt"), "--save", str(tmp_path / "policy.json")),
    )
    terminals.append(terminal)
    terminal.wait_for(r"\d+ of 800 replies judged")
    terminal.type("\x03")
    ended = terminal.wait_for("(?s).*\x1b\\[\\?25h", timeout=30)
    assert "Traceback" not in ended
    assert terminal.exit_code() == 130
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
