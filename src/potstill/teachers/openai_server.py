"""The teacher source ``openai``: a language model on a server with the interface of OpenAI, asked to choose a class."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from potstill.errors import ComponentError
from potstill.registry import teacher_sources
from potstill.teachers.client import AnswerError, Client
from potstill.teachers.context import SourceContext
from potstill.teachers.remote import Remote
from potstill.teachers.rows import Rows

_BLANK = " \t\r\nĠĊ▁"
_NEVER = -9999.0
_AMBIGUOUS = 0.1
_LEAST = 1e-12


@teacher_sources.register("openai", reads_rows=True)
def openai(
    context: SourceContext,
    *,
    url: str,
    model: str,
    prompt: str,
    answers: list[str] | None = None,
    api: Literal["completions", "chat"] = "completions",
    system: str | None = None,
    top_logprobs: int = 20,
    unanswered: Literal["error", "uniform"] = "error",
    api_key_variable: str | None = None,
    batch_size: int = 64,
    timeout: float = 60.0,
    retries: int = 3,
    backoff: float = 0.5,
    concurrency: int = 1,
    headers: dict[str, str] | None = None,
    extra: dict[str, Any] | None = None,
) -> Remote:
    """A language model on a server such as vLLM, llama.cpp or TGI; a class is scored by the first token of its answer.

    The logit of a class is the log-probability that its answer begins: the logarithm of the summed probabilities of
    those listed tokens that begin its answer and no other, without blanks before them and in either case (``" Yes"``,
    ``"yes"`` and ``" y"`` for ``yes``). A class of which no token is listed gets the largest value that it can have:
    the smallest listed log-probability, or that of all that the list leaves over where this is less. The probabilities
    of the classes therefore need not sum to 1; a softmax over the logits is the choice among the answers.

    ``completions`` sends a list of prompts in one request, ``chat`` one request a sample: raise ``concurrency``. One
    token is generated, at temperature 0. The server gets the rows of the table: random augmentation of what the student
    sees does not reach it.

    Args:
        context: has the table and the names of the classes.
        url: the base address, such as ``http://localhost:8000/v1``.
        model: the name by which the server knows the model.
        prompt: the text, with ``{column}`` for what a column holds and ``{{`` for a brace. With ``completions`` it
            should end where the answer begins, without a blank.
        answers: the text that stands for each class, in the order of the classes; their names if omitted.
        api: ``completions`` or ``chat``.
        system: the text of the system, for ``chat``.
        top_logprobs: tokens that the server lists; vLLM and OpenAI allow 20 unless told otherwise, TGI 5. There must be
            as many as classes.
        unanswered: what a sample gets for which no answer is among the tokens: an error, or the same for every class.
        api_key_variable: the name of the environment variable that holds the key, which no recipe does.
        batch_size: prompts a request at most, for ``completions``.
        timeout: seconds for a whole answer.
        retries: repeats of a request, as for the source ``http``.
        backoff: seconds before the first repeat, twice as long before each further one; ``Retry-After`` is obeyed.
        concurrency: requests at once at most.
        headers: sent with each request; ``env:NAME`` in a value stands for an environment variable.
        extra: further entries of the request; ``null`` takes one away, so ``{max_tokens: null, max_completion_tokens:
            1}`` renames it. A model that thinks first must be told not to, as the server wants it.

    Raises:
        ComponentError: answers that begin alike, more classes than ``top_logprobs``, or a prompt without a column.
        DataError: no such column.

    Reference for the answers: https://platform.openai.com/docs/api-reference/completions/object and
    https://platform.openai.com/docs/api-reference/chat/object; llama.cpp lists the tokens of completions as those of
    chats, https://github.com/ggml-org/llama.cpp/pull/10783.
    """
    texts = tuple(context.label_names if answers is None else answers)
    _check_answers(texts, context.label_names, top_logprobs)
    if system is not None and api != "chat":
        raise ComponentError("`system` is for `api: chat`; put its text into `prompt`")
    columns = _fields(prompt)
    sent = dict(headers or {})
    if api_key_variable is not None:
        sent["Authorization"] = f"Bearer env:{api_key_variable}"
    path = "/completions" if api == "completions" else "/chat/completions"
    return Remote(
        Client(url.rstrip("/") + path, headers=sent, timeout=timeout, retries=retries, backoff=backoff),
        Rows(context, columns, bare=False),
        _Prompts(model, prompt, texts, api, system, top_logprobs, unanswered, dict(extra or {})),
        classes=len(texts),
        batch_size=1 if api == "chat" else batch_size,
        concurrency=concurrency,
        prefix=context.prefix,
    )


@dataclass(frozen=True)
class _Prompts:
    """Prompts in, log-probabilities of the first token out."""

    model: str
    prompt: str
    texts: tuple[str, ...]
    api: str
    system: str | None
    top_logprobs: int
    unanswered: str
    extra: Mapping[str, Any]

    def body(self, ids: Sequence[int], rows: Sequence[Any]) -> Any:
        prompts = [self.prompt.format_map({k: "" if v is None else v for k, v in row.items()}) for row in rows]
        body: dict[str, Any] = {"model": self.model, "max_tokens": 1, "temperature": 0}
        if self.api == "completions":
            body |= {"prompt": prompts, "logprobs": self.top_logprobs}
        else:
            before = [] if self.system is None else [{"role": "system", "content": self.system}]
            body |= {"messages": [*before, {"role": "user", "content": prompts[0]}]}
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return {name: value for name, value in {**body, **self.extra}.items() if value is not None}

    def read(self, answer: Any, ids: Sequence[int], classes: int | None) -> NDArray[np.float64]:
        choices = _choices(answer, len(ids))
        return np.stack([self._scores(_listed(c, i), i) for c, i in zip(choices, ids, strict=True)])

    def expected(self, count: int, classes: int | None) -> str:
        form = "top_logprobs" if self.api == "completions" else "content[0].top_logprobs"
        return f"`choices` for {count} prompts, each with `logprobs.{form}`"

    def plain(self) -> dict[str, Any]:
        return {
            "source": "openai",
            "model": self.model,
            "prompt": self.prompt,
            "answers": list(self.texts),
            "api": self.api,
            "system": self.system,
            "top_logprobs": self.top_logprobs,
            "unanswered": self.unanswered,
            "extra": dict(self.extra),
        }

    def _scores(self, listed: Mapping[str, float], sample: int) -> NDArray[np.float64]:
        """Return the log-probability of each class from those of the listed tokens."""
        starts = [_bare(text) for text in self.texts]
        given = np.zeros(len(starts))
        alike: dict[str, float] = {}
        for token, value in listed.items():
            begun = [place for place, start in enumerate(starts) if _bare(token) and start.startswith(_bare(token))]
            if len(begun) == 1:
                given[begun[0]] += math.exp(value)
            elif begun:
                alike[token] = math.exp(value)
        if sum(alike.values()) > _AMBIGUOUS * given.sum():
            token = max(alike, key=alike.__getitem__)
            raise AnswerError(f"the token {token!r} for sample {sample}, with which several of the answers begin")
        if not given.any() and self.unanswered == "error":
            raise AnswerError(
                f"none of the answers for sample {sample} but {', '.join(map(repr, list(listed)[:8]))} (change the "
                "prompt or the answers, or say `unanswered: uniform`)"
            )
        least = min(listed.values())
        left = math.log(max(_LEAST, 1 - sum(map(math.exp, listed.values()))))
        with np.errstate(divide="ignore"):
            return np.where(given > 0, np.log(given), min(least, left))


def _bare(text: str) -> str:
    """Return a text without the blanks before it, in whichever way a tokenizer writes them, and in lower case."""
    return text.lstrip(_BLANK).casefold()


def _check_answers(texts: Sequence[str], names: Sequence[str], top_logprobs: int) -> None:
    if len(texts) < 2 or (names and len(texts) != len(names)):
        raise ComponentError(f"expected an answer for each of the classes {list(names)}, got {list(texts)}")
    if not len(texts) <= top_logprobs:
        raise ComponentError(f"{len(texts)} classes cannot be told by {top_logprobs} tokens; raise `top_logprobs`")
    for place, text in enumerate(texts):
        for other in texts[:place]:
            shorter, longer = sorted((_bare(text), _bare(other)), key=len)
            same_word = shorter.split()[:1] == longer.split()[:1]
            if longer.startswith(shorter) or same_word:
                raise ComponentError(
                    f"the answers {other!r} and {text!r} begin alike, so their first tokens cannot tell them apart; "
                    "give `answers` that do not, such as letters"
                )


def _fields(prompt: str) -> list[str]:
    """Return the columns that a prompt names."""
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise ComponentError(f"the prompt is no template: {error}; write {{{{ for a brace") from error
    named = [(field, spec or "", conversion) for _, field, spec, conversion in parts if field is not None]
    for field, spec, conversion in named:
        if not field or conversion or spec or any(sign in field for sign in ".[]"):
            raise ComponentError(f"expected the name of a column in braces, got '{field}' in the prompt")
    if not named:
        raise ComponentError("the prompt names no column, so every sample would be asked alike; write {column}")
    return list(dict.fromkeys(field for field, _, _ in named))


def _choices(answer: Any, count: int) -> list[Any]:
    """Return the choices in the order of the prompts; one server sends an answer a prompt, in a list."""
    answers = answer if isinstance(answer, list) else [answer]
    if not all(isinstance(each, dict) and isinstance(each.get("choices"), list) for each in answers):
        raise AnswerError("an answer without `choices`")
    choices = [choice for each in answers for choice in each["choices"]]
    if len(choices) != count or not all(isinstance(choice, dict) for choice in choices):
        raise AnswerError(f"{len(choices)} choices for {count} prompts")
    places = [choice.get("index") for choice in choices]
    if any(type(place) is not int for place in places) or sorted(places) != list(range(count)):
        if count == 1:
            return choices
        raise AnswerError(f"choices of the index {places[:8]}")
    return [choices[places.index(place)] for place in range(count)]


def _listed(choice: Mapping[str, Any], sample: int) -> dict[str, float]:
    """Return the log-probabilities of the first token's alternatives, of a completion or of a chat."""
    found = choice.get("logprobs")
    listed: Any = None
    if isinstance(found, dict):
        if isinstance(found.get("content"), list):
            first = next(iter(found["content"]), None)
            top = first.get("top_logprobs") if isinstance(first, dict) else None
            if isinstance(top, list):
                listed = [(e.get("token"), e.get("logprob")) for e in top if isinstance(e, dict)]
        elif isinstance(found.get("top_logprobs"), list):
            first = next(iter(found["top_logprobs"]), None)
            listed = list(first.items()) if isinstance(first, dict) else None
    if not listed:
        raise AnswerError(f"no list of likely tokens for sample {sample}; does the server give log-probabilities?")
    tokens: dict[str, float] = {}
    for token, value in listed:
        if not isinstance(token, str) or type(value) not in (int, float) or not value <= 1e-3:
            raise AnswerError(f"the token {token!r} with the log-probability {value!r}, for sample {sample}")
        if value > _NEVER:
            tokens[token] = float(np.logaddexp(tokens.get(token, -np.inf), value))
    if not tokens:
        raise AnswerError(f"no likely token for sample {sample}")
    return tokens
