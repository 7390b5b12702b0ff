"""``chat``: a conversation with a model of the cloud in the terminal, or one question from a script."""

from __future__ import annotations

import contextlib
import json as json_format
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tidemill.cli.output import count, emit, is_terminal, note, paint, say, show_error
from tidemill.cli.parsing import InProject, Json
from tidemill.errors import InvalidRequest, NotFound, TidemillError, Unauthorized
from tidemill.sdk import connection
from tidemill.sdk.chatting import Chat
from tidemill.sdk.client import Client
from tidemill.units import format_usd

_HELP = (
    ("/system TEXT", "what the model is told before all else; without TEXT, show it"),
    ("/model NAME", "go on with another model; without NAME, list them"),
    ("/clear", "begin anew"),
    ("/save FILE", "write the conversation: Markdown, or JSON for FILE.json"),
    ("/exit", "leave, as Ctrl-D does"),
    ("Ctrl-C", "stop the answer"),
)


def chat_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Its name; left out, the only one there is.")] = "",
    message: Annotated[str, typer.Option("--message", "-m", metavar="TEXT", help="Ask this, and leave.")] = "",
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="What it is told before all else.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", min=0, help="The longest answer.")] = 0,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="N", help="0 to 2; the model's own unless set.")
    ] = -1,
    url: Annotated[
        str, typer.Option("--url", metavar="URL", help="The gateway's address; the cloud's unless given.")
    ] = "",
    show_curl: Annotated[bool, typer.Option("--show-curl", help="Show how curl asks that, and leave.")] = False,
    show_python: Annotated[bool, typer.Option("--show-python", help="Show how Python asks that, and leave.")] = False,
    project: InProject = None,
    json: Json = False,
) -> None:
    """Talk with a model. What comes with -m, or on standard input, is asked once; else it is a conversation."""
    chat = Chat(url=_gateway_url(url, project), token=connection.find(None, None).token, model=model)
    chat.system = system
    chat.options |= {"max_tokens": max_tokens} if max_tokens else {}
    chat.options |= {"temperature": temperature} if temperature >= 0 else {}
    if not chat.model:
        chat.model = _only_model(chat)
    is_piped = not is_terminal(sys.stdin) and not (show_curl or show_python)
    if is_piped:
        piped = sys.stdin.read().strip()
        message = f"{message}\n\n{piped}" if message and piped else message or piped
    if show_curl or show_python:
        chat.messages.append({"role": "user", "content": message or "Hello"})
        say(_curl(chat) if show_curl else _python(chat))
    elif message:
        _ask_once(chat, message, as_json=json)
    elif is_piped or json:
        raise InvalidRequest("There is nothing to ask.", field="--message", mend="Write -m TEXT, or pipe a text in.")
    else:
        _converse(chat)


# One question


def _ask_once(chat: Chat, message: str, *, as_json: bool) -> None:
    if as_json:
        for _ in chat.ask(message):
            pass
        emit({"model": chat.model, **chat.reply.to_json()})
        return
    if is_terminal(sys.stdout):
        _show(chat, message)
    else:
        for piece in chat.ask(message):
            sys.stdout.write(piece)
            sys.stdout.flush()
        say()
    if chat.reply.finish == "length":
        note("the answer was cut off: it reached its largest length")


# A conversation


def _converse(chat: Chat) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() has line editing and a history then
    say(f"{paint(chat.model, 'bold')}  {paint('/help for commands, Ctrl-D to leave', 'muted')}")
    totals = [0, 0, 0]
    while True:
        try:
            said = input(f"\n{_prompt()}").strip()
        except EOFError:
            say()
            break
        except KeyboardInterrupt:
            say()
            note("Ctrl-D or /exit leaves")
            continue
        if not said:
            continue
        try:
            if said.startswith("/"):
                if _command(chat, said):
                    break
                continue
            say()
            _show(chat, said)
        except TidemillError as error:
            show_error(error)
        finally:
            if not said.startswith("/"):
                totals[0] += bool(chat.reply.text)
                totals[1] += chat.reply.prompt_tokens
                totals[2] += chat.reply.completion_tokens
    if totals[0]:
        cost = _cost(chat.model, totals[1] + totals[2])
        told = f"{count(totals[0], 'answer')}, {totals[1]:,} tokens in, {totals[2]:,} out"
        note(told + (f", about {cost}" if cost else ""))


def _prompt() -> str:
    """What stands before what is typed; marked so that line editing knows that colours take no room."""
    painted = paint("› ", "cyan")
    return painted.replace("\x1b[36m", "\x01\x1b[36m\x02").replace("\x1b[0m", "\x01\x1b[0m\x02")


def _command(chat: Chat, said: str) -> bool:
    """Whether the conversation is over. Raises: TidemillError."""
    name, _, rest = said.partition(" ")
    rest = rest.strip()
    match name:
        case "/exit" | "/quit" | "/bye":
            return True
        case "/help" | "/?":
            left = max(len(command) for command, _ in _HELP)
            for command, told in _HELP:
                say(f"  {paint(command.ljust(left), 'cyan')}  {paint(told, 'muted')}")
        case "/clear":
            chat.clear()
            note("what was said is forgotten")
        case "/system":
            if rest:
                chat.system = rest
                note("the model is told this from now on")
            else:
                say(chat.system or paint("nothing", "muted"))
        case "/model":
            names = chat.models()
            if not rest:
                for one in names:
                    say(f"{paint('*', 'green') if one == chat.model else ' '} {one}")
            elif rest in names:
                chat.model = rest
                note(f"{rest} answers from now on")
            else:
                raise NotFound(f"There is no model {rest}.", field="/model", mend=f"There are {', '.join(names)}.")
        case "/save":
            _save(chat, rest)
        case _:
            raise InvalidRequest(f"There is no command {name}.", mend="/help lists them.")
    return False


def _save(chat: Chat, name: str) -> None:
    path = Path(name or "chat.md").expanduser()
    if path.suffix == ".json":
        text = json_format.dumps(chat.body(), indent=2, ensure_ascii=False) + "\n"
    else:
        parts = [f"# {chat.model}", *(f"**{one['role']}**\n\n{one['content']}" for one in chat.messages)]
        text = "\n\n".join(parts) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"It cannot be written: {error.strerror}.", field="/save", value=str(path)) from error
    note(f"saved {path}")


# How an answer looks


def _show(chat: Chat, message: str) -> None:
    """Show the answer as it comes; Ctrl-C stops it."""
    asking = chat.ask(message)
    screen = _screen() if is_terminal(sys.stdout) else _plain()
    was_stopped = False
    with screen as put:
        try:
            for piece in asking:
                put(piece)
        except KeyboardInterrupt:
            was_stopped = True
            asking.close()
    reply = chat.reply
    if was_stopped:
        note("stopped" if reply.text else "stopped, and forgotten")
        return
    speed = ""
    if reply.completion_tokens > 1 and reply.whole_s > reply.first_s:
        speed = f", {reply.completion_tokens / (reply.whole_s - reply.first_s):,.0f} tokens/s"
    cut = ", cut off at its largest length" if reply.finish == "length" else ""
    cut = cut or (", ended by a guardrail" if reply.finish == "content_filter" else "")
    note(f"{reply.completion_tokens or '?'} tokens, the first after {reply.first_s * 1000:,.0f} ms{speed}{cut}")


@contextlib.contextmanager
def _plain() -> Iterator[Callable[[str], None]]:
    def put(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    yield put
    say()


@contextlib.contextmanager
def _screen() -> Iterator[Callable[[str], None]]:
    """Markdown on the terminal: what is whole is printed for good, the paragraph that comes is drawn anew."""
    from rich.console import Console
    from rich.live import Live
    from rich.markdown import Markdown
    from rich.spinner import Spinner

    console = Console(highlight=False, soft_wrap=False)
    rest = ""
    has_printed = False
    with Live(Spinner("dots", style="dim"), console=console, refresh_per_second=12, transient=True) as live:

        def put(piece: str) -> None:
            nonlocal rest, has_printed
            rest += piece
            whole, rest = _paragraphs(rest)
            if whole:
                live.update("")
                if has_printed:
                    live.console.print()
                live.console.print(Markdown(whole))
                has_printed = True
            live.update(Markdown(_tail(rest, console.height - 2)) if rest.strip() else Spinner("dots", style="dim"))

        try:
            yield put
        finally:
            live.update("")
    if rest.strip():
        if has_printed:
            console.print()
        console.print(Markdown(rest))


def _paragraphs(text: str) -> tuple[str, str]:
    """What is whole of a Markdown text, and the rest: it is cut at an empty line outside of code and lists.

    >>> _paragraphs("one\\n\\ntwo")
    ('one', 'two')
    >>> _paragraphs("```\\na\\n\\nb")
    ('', '```\\na\\n\\nb')
    """
    lines = text.split("\n")
    end, fenced = 0, False
    for place, line in enumerate(lines[:-1]):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        following = lines[place + 1]
        goes_on = following.startswith((" ", "-", "*", "+", "|")) or following[:1].isdigit()
        if not line.strip() and not fenced and following and not goes_on:
            end = place + 1
    return "\n".join(lines[:end]).rstrip(), "\n".join(lines[end:])


def _tail(text: str, lines: int) -> str:
    """The last lines of a text that is longer than the screen."""
    kept = text.split("\n")
    return text if len(kept) <= lines else "\n".join(kept[-max(1, lines) :])


# What is asked, for elsewhere


def _curl(chat: Chat) -> str:
    body = json_format.dumps(chat.body(), indent=2, ensure_ascii=False)
    return (
        f"curl {chat.url}/v1/chat/completions \\\n"
        f'  --header "Authorization: Bearer ${connection.CREDENTIAL_VARIABLE}" \\\n'
        f"  --header 'Content-Type: application/json' \\\n"
        f"  --data {shlex.quote(body)}"
    )


def _python(chat: Chat) -> str:
    given = "".join(f"    {name}={value!r},\n" for name, value in chat.body().items())
    return (
        "# pip install openai\n"
        "import os\n\n"
        "from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{chat.url}/v1", api_key=os.environ["{connection.CREDENTIAL_VARIABLE}"])\n'
        f"stream = client.chat.completions.create(\n{given}    stream=True,\n)\n"
        "for part in stream:\n"
        "    if part.choices:\n"
        '        print(part.choices[0].delta.content or "", end="", flush=True)\n'
        "print()"
    )


# Where, which, how much


def _gateway_url(given: str, project: str | None) -> str:
    """Where the gateway is. The home folder's token goes to its own gateway only. Raises: Unauthorized."""
    found = connection.find(None, None)
    own = connection.endpoint(connection.home()) if found.is_local else None
    url = str((own or {}).get("gateway_url") or "")
    given = given.rstrip("/").removesuffix("/v1")
    if given and found.is_local and given != url:
        mend = f"Put one in {connection.CREDENTIAL_VARIABLE}, and the cloud's address in {connection.URL_VARIABLE}."
        raise Unauthorized(f"There is no token for {given}.", mend=mend)
    if given or url:
        return given or url
    with Client(project=project) as client:
        return client.status().gateway_url


def _only_model(chat: Chat) -> str:
    names = chat.models()
    if len(names) == 1:
        return names[0]
    if not names:
        raise NotFound("No model is served yet.", field="MODEL", mend="Run a service first; see docs/serving.md.")
    raise InvalidRequest("There are several models.", field="MODEL", mend=f"Name one of {', '.join(names)}.")


def _cost(model: str, tokens: int) -> str:
    """What that many tokens of a model took on average; empty when it is not known, or not for us to know."""
    try:
        with Client() as client:
            costs: dict[str, Any] = {one["model"]: one for one in client.model_costs()}
    except TidemillError:
        return ""
    known = costs.get(model)
    amount_micro = known["amount_micro_per_1k_tokens"] * tokens // 1000 if known else 0
    return format_usd(amount_micro) if amount_micro else ""
