"""Personal data as Microsoft Presidio finds it: names, places, and what it knows of many countries. An extra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tidemill.guards.looking import Found

_REACH: Final = 256


class Presidio:
    """Finds what Presidio's analyzer does, with at least ``score``.

    ``entities`` are Presidio's names, such as PERSON; none given means all. ``model`` is a spaCy model that is
    installed; empty: what has a form is found, and nothing that needs a language model, such as names of people.
    """

    reach: int = _REACH
    is_slow: bool = True

    def __init__(
        self, *, entities: Sequence[str] = (), language: str = "en", score: float = 0.5, model: str = ""
    ) -> None:
        if isinstance(entities, str):
            raise ValueError(f"entities: {entities!r} is no list")
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise ValueError(f"score: {score!r} is no share from 0 to 1")
        self._entities, self._language, self._score, self._model = list(entities), language, score, model
        self._engine: Any = None

    def find(self, text: str, start: int = 0) -> list[Found]:
        """The pieces, the better founded of those that overlap."""
        engine = self._engine = self._engine or _engine(self._language, self._model)
        results = engine.analyze(
            text=text[start:], language=self._language, entities=self._entities or None, score_threshold=self._score
        )
        kept: list[Found] = []
        for one in sorted(results, key=lambda each: (-each.score, each.start)):
            first, end = start + one.start, start + one.end
            if end - first <= self.reach and all(end <= other.start or other.end <= first for other in kept):
                kept.append(Found(first, end, str(one.entity_type)))
        return sorted(kept)

    def open_from(self, text: str) -> int:
        """What comes may change what the last words are."""
        return max(0, len(text) - self.reach)


def _engine(language: str, model: str) -> Any:
    """Presidio's analyzer. Raises: ImportError that says what to install."""
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
    except ImportError as error:
        raise ImportError("The kind presidio needs an extra: pip install 'tidemill[presidio]'") from error
    nlp = SpacyNlpEngine(models=[{"lang_code": language, "model_name": model or f"blank:{language}"}])
    nlp.nlp = {language: spacy.load(model) if model else spacy.blank(language)}
    return AnalyzerEngine(nlp_engine=nlp, supported_languages=[language])
