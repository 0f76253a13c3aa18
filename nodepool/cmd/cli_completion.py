"""`nodepool completion`: scripts for bash and zsh, made from the parser; what only the daemon knows they ask for.

The words of nodes, machines, labels and the like come from `nodepool completion words KIND`, one a line, and nothing
when no daemon answers.  argparse tells its arguments to nobody: its private lists are read, and a test says when they
change.
"""
# ruff: noqa: SLF001

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from nodepool.cmd.client import DONE, Client, CommandError
from nodepool.cmd.tables import plain

FILES = "files"


class Argument(NamedTuple):
    """An option or a place of a command: its words ("" for a place), help, and how its value is completed."""

    options: tuple[str, ...]
    help: str
    takes: str  # "" (an option without a value), FILES, a key of KINDS, "any", or words with blanks between
    many: bool = False


def completion(client: Client, args: argparse.Namespace) -> int:
    """`completion bash|zsh`, and `completion words KIND` for the scripts."""
    if args.shell == "words":
        sys.stdout.write("".join(f"{word}\n" for word in _known(client, args.kind)))
        return DONE
    from nodepool.cmd.cli import LOCAL, parser_of

    top = parser_of(list(LOCAL))
    commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    parsers: Mapping[str, argparse.ArgumentParser] = commands.choices
    told = {name: list(_arguments(parser, name)) for name, parser in parsers.items()}
    script = {"bash": _bash, "zsh": _zsh}[args.shell]
    print(script(helps, list(_arguments(top, "")), told))
    return DONE


def _of(client: Client, path: str, field: str) -> Iterator[str]:
    return (str(item[field]) for item in client.items(path))


KINDS: Mapping[str, Callable[[Client], Iterator[str]]] = {
    "nodes": lambda client: _of(client, "/nodes", "id"),
    "machines": lambda client: _of(client, "/machines", "name"),
    "things": lambda client: iter([*_of(client, "/nodes", "id"), *_of(client, "/machines", "name")]),
    "labels": lambda client: _of(client, "/labels", "label"),
    "providers": lambda client: _of(client, "/machines", "provider"),
    "requests": lambda client: _of(client, "/requests", "id"),
    "images": lambda client: _of(client, "/builds", "image"),
    "builds": lambda client: (f"{item['image']}-{item['id']}" for item in client.items("/builds")),
}
_BY_DEST = {
    "nodes": "nodes",
    "node": "nodes",
    "name": "things",
    "machine": "machines",
    "label": "labels",
    "labels": "labels",
    "provider": "providers",
    "request": "requests",
    "image": "images",
    "build": "builds",
    **dict.fromkeys(("url", "config", "secure", "ssh_key", "identity", "dir"), FILES),
}


def _known(client: Client, kind: str) -> list[str]:
    """What there is of a kind, or nothing; only words that a shell takes as one."""
    if kind not in KINDS:
        return []
    try:
        words = dict.fromkeys(plain(word) for word in KINDS[kind](client))
    except CommandError:
        return []
    return [word for word in words if word and not word.startswith("-") and " " not in word]


def _arguments(parser: argparse.ArgumentParser, command: str) -> Iterator[Argument]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        help_ = (action.help or "") % {"default": action.default, "prog": "nodepool"}
        if action.nargs == 0 or (action.option_strings and action.nargs == "?"):  # what may follow may also not
            yield Argument(tuple(action.option_strings), help_, "")
            continue
        takes = " ".join(map(str, action.choices or ())) or _BY_DEST.get(action.dest, "any")
        if action.dest == "state":
            takes = _states(command)
        many = action.nargs in {"+", "*", argparse.REMAINDER}
        yield Argument(tuple(action.option_strings), help_, takes, many)


def _states(command: str) -> str:
    from nodepool.model import NodeState, RequestState

    return " ".join(RequestState if command == "request-list" else NodeState)


def _bash(helps: Mapping[str, str], top: list[Argument], commands: Mapping[str, list[Argument]]) -> str:
    valued, words = [], []
    common = {option for argument in top if argument.takes for option in argument.options}
    for name, arguments in {"": top, **commands}.items():
        of = name or "*"
        valued += [
            f"{'|'.join(f'{of},{option}' for option in argument.options)}) {_bash_of(argument.takes)} ;;"
            for argument in arguments
            if argument.takes and argument.options and (not name or not common.issuperset(argument.options))
        ]
        options = " ".join(option for argument in arguments for option in argument.options)
        place = next((argument.takes for argument in arguments if not argument.options), "")
        more = _quoted(options if name else f"{' '.join(helps)} {options}")
        words.append(f"{name or _quoted('')}) {_bash_of(place)}; words+=' '{more} ;;")
    return _BASH.format(
        skipped="|".join(sorted(common)), valued="\n        ".join(valued), words="\n        ".join(words)
    )


def _bash_of(takes: str) -> str:
    """The shell's words that put into `words` what a value may be."""
    if takes in {"", "any"}:
        return "words=''"
    if takes == FILES:
        return "files=yes"
    return (
        f'words=$(nodepool "${{url[@]}}" completion words {takes} 2>/dev/null)'
        if takes in KINDS
        else f"words={_quoted(takes)}"
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


_BASH = """\
# bash completion for nodepool, printed by: nodepool completion bash
_nodepool() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD - 1]}} command='' words='' files='' word i
    local -a url=()
    if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=${{COMP_WORDS[COMP_CWORD - 2]}}; fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${{COMP_WORDS[i]}} in
        {skipped})
            word=${{COMP_WORDS[i]}}
            [[ ${{COMP_WORDS[++i]}} == = ]] && ((i++))
            [[ $word == --url ]] && url=(--url "${{COMP_WORDS[i]}}") ;;
        -*) ;;
        *) [[ $command ]] || command=${{COMP_WORDS[i]}} ;;
        esac
    done
    COMPREPLY=()
    case $command,$prev in
        {valued}
        *) case $command in
        {words}
        esac ;;
    esac
    if [[ $files ]]; then
        compopt -o default 2>/dev/null
        return
    fi
    while read -r -d ' ' word; do
        [[ $word && $word == "$cur"* ]] && COMPREPLY+=("$word")
    done <<<"${{words//$'\\n'/ }} "
}}
complete -F _nodepool nodepool"""


def _zsh(helps: Mapping[str, str], top: list[Argument], commands: Mapping[str, list[Argument]]) -> str:
    described = "\n        ".join(_quoted(f"{name}:{text}") for name, text in helps.items())
    cases = "\n            ".join(
        f"{name}) _arguments {' '.join(spec for argument in arguments for spec in _zsh_of(argument))} ;;"
        for name, arguments in commands.items()
    )
    options = " ".join(spec for argument in top for spec in _zsh_of(argument))
    return _ZSH.format(described=described, options=options, cases=cases)


def _zsh_of(argument: Argument) -> Iterator[str]:
    """What _arguments is told (zshcompsys(1)) of an option, each of its words, or of a place."""
    message = _escaped(argument.help) or " "
    action = {"": "", FILES: "_files", "any": " "}.get(argument.takes)
    if action is None:
        action = f"{{_nodepool_words {argument.takes}}}" if argument.takes in KINDS else f"({argument.takes})"
    value = f":{message}:{action}" if argument.takes else ""
    if not argument.options:
        yield _quoted(f"{'*' if argument.many else ''}{value}")
    for option in argument.options:
        yield _quoted(f"{option}[{message}]{value}")


def _escaped(text: str) -> str:
    for char in "\\[]:":
        text = text.replace(char, f"\\{char}")
    return text


_ZSH = """\
#compdef nodepool
# zsh completion for nodepool, printed by: nodepool completion zsh
_nodepool_words() {{
    local -a found
    found=(${{(f)"$(nodepool completion words $1 2>/dev/null)"}})
    compadd -a found
}}
_nodepool_commands() {{
    local -a commands
    commands=(
        {described}
    )
    _describe command commands
}}
_nodepool() {{
    local curcontext=$curcontext state line
    local -A opt_args
    _arguments -C {options} '1:command:_nodepool_commands' '*::argument:->argument'
    if [[ $state == argument ]]; then
        case $words[1] in
            {cases}
        esac
    fi
}}
if [[ $funcstack[1] == _nodepool ]]; then _nodepool "$@"; else compdef _nodepool nodepool; fi"""
