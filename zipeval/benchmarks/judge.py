"""A judge model behind an OpenAI-compatible address; what it is asked is in zipeval/benchmarks/protocols.py."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

import openai

from zipeval.benchmarks.protocols import Protocol
from zipeval.config.schema import JudgeConfig
from zipeval.errors import UsageError
from zipeval.utils.urls import public_url

KEY = "OPENAI_API_KEY"
TIMEOUT = 60.0  # seconds for one reply
RETRIES = 2  # of a request, with the client's own pauses
THREADS = 8
GIVE_UP = 10  # requests in a row without a reply, after which the rest is left for another run


class JudgeError(Exception):
    """No verdict on one answer; its sample stays unscored, and the run goes on."""


class NoVerdict(JudgeError):
    """The judge replied, though not with a verdict; about another answer it may."""


class Judge:
    """The model that `judge.url` and `judge.model` name.

    Args:
        config: both set. The key is read from the environment, and never part of a message.

    Raises:
        UsageError: if the key cannot be sent.
    """

    def __init__(self, config: JudgeConfig):
        self.named = f"judge.model={config.model} at judge.url={public_url(config.url)}"
        self._model = config.model
        key = os.environ.get(KEY, "").strip()
        if not re.fullmatch("[!-~]*", key):  # the client's own message would show it
            raise UsageError(
                f"{KEY}: it holds a character that no key has, such as a line break. Set it again."
            )
        self._secrets = [
            secret for secret in (key, urlsplit(config.url).password) if secret
        ]
        self._client = openai.OpenAI(
            api_key=key or "none",  # the client insists on one, local servers do not
            base_url=config.url,
            timeout=TIMEOUT,
            max_retries=RETRIES,
        )
        self._failures = 0  # requests in a row without a reply

    def check(self, protocols: Iterable[Protocol]) -> None:
        """Ask one question of each.

        Raises:
            UsageError: if one gives no verdict.
        """
        try:
            for protocol in protocols:
                self.verdict(protocol, protocol.probe)
        except JudgeError as error:
            raise UsageError(
                f"{self.named}: {error}. Set judge.url= to an OpenAI-compatible server (its address ends in /v1), "
                f"judge.model= to a model that it serves, and its key, if it needs one, in the environment as {KEY}."
            ) from error

    def verdict(self, protocol: Protocol, sample: dict) -> dict:
        """See Protocol.

        Raises:
            JudgeError: if there is none.
        """
        messages = protocol.messages(sample)
        try:
            reply = self._client.chat.completions.create(
                model=self._model, messages=messages, temperature=0
            )
        except openai.APITimeoutError as error:
            raise JudgeError(f"no reply within {self._client.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise JudgeError(
                self._said(f"not reachable ({error.__cause__ or error})")
            ) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            # Servers repeat a part of the key in what they say.
            refused = (
                "the key is refused"
                if self._secrets
                else f"a key is needed, {KEY} is not set"
            )
            raise JudgeError(f"{refused} (HTTP {error.status_code})") from error
        except openai.BadRequestError as error:  # such as an answer that a filter stops
            raise NoVerdict(self._said(str(error))) from error
        except openai.OpenAIError as error:
            raise JudgeError(self._said(str(error))) from error
        except ValueError as error:  # the client lets it pass
            raise JudgeError(
                self._said(f"its reply cannot be read ({error})")
            ) from error
        text = _text(reply).strip()
        if not text:
            raise NoVerdict("its reply is empty")
        try:
            return protocol.verdict(text, sample)
        except ValueError as error:
            raise NoVerdict(self._said(f"its reply {error}: {text!r}")) from error

    def score(
        self, protocol: Protocol, samples: list[dict], advance: Callable[[int], None]
    ) -> None:
        """Ask about each of the samples that are unscored; each is left with a verdict, or the reason for none."""
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(partial(self._score, protocol), samples):
                advance(1)

    def _score(self, protocol: Protocol, sample: dict) -> None:
        if self._failures >= GIVE_UP:
            sample["unscored"] = f"not asked: the judge failed {GIVE_UP} times in a row"
            return
        try:
            sample |= self.verdict(protocol, sample)
            del sample["unscored"]
            self._failures = 0
        except JudgeError as error:
            sample["unscored"] = str(error)
            self._failures = 0 if isinstance(error, NoVerdict) else self._failures + 1

    def _said(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())[:200]


def _text(reply) -> str:
    try:
        said = reply.choices[0].message.content
    except (
        AttributeError,
        LookupError,
        TypeError,
    ):  # the client does not validate what servers send
        return ""
    return said if isinstance(said, str) else ""
