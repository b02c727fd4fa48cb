"""What a hub's refusal means to the one who asked, and what to do about it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from urllib.parse import urlsplit

import attrs

from rbee.errors import (
    ForbiddenError,
    NotFoundError,
    PeerError,
    RbeeError,
    UnauthorizedError,
    UnavailableError,
)

RETRIED = (408, 425, 429, 500, 502, 503, 504)


@attrs.frozen
class Asked:
    """What was asked for, of whom, and whether a token went along."""

    repo: str
    revision: str
    endpoint: str
    has_token: bool

    @property
    def name(self) -> str:
        return f"hf:{self.repo}" + (f"@{self.revision}" if self.revision else "")

    @property
    def hub(self) -> str:
        """The endpoint as it may be shown: without a password."""
        parts = urlsplit(self.endpoint)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    @property
    def with_token(self) -> str:
        other = "unset HF_TOKEN; " if self.has_token else ""
        return f"{other}hf auth login && rbee-keeper model pull {self.name}"

    # answers -------------------------------------------------------------------------------------

    def refused(self, status: int, headers: Mapping[str, str], file: str = "") -> RbeeError:
        """Turn an answer that is no success into an error."""
        error = self._error(status, headers.get("x-error-code", ""), file)
        said = "".join(filter(str.isprintable, headers.get("x-error-message", "")))[:300]
        if said:
            error.message += f"; it says: {said}"
        return error

    def _error(self, status: int, code: str, file: str) -> RbeeError:
        what = f"{file} of {self.name}" if file else self.name
        if code == "GatedRepo" or (status == 403 and self.has_token):
            return self._gated(what, status)
        if status in (401, 403):
            return self._unauthorised(what, status)
        if status == 404:
            return self._missing(what, code, file)
        kind = UnavailableError if status in RETRIED else PeerError
        return kind(
            f"cannot fetch {what}: {self.hub} answers {status} (needed: 200)",
            code="hub_failed",
            hint=f"rbee-keeper model pull {self.name}   # in a while",
            status=status,
        )

    def _gated(self, what: str, status: int) -> RbeeError:
        token = "the token sent belongs to nobody who" if self.has_token else "nobody without one"
        page = f"{self.hub}/{self.repo}"
        return ForbiddenError(
            f"cannot fetch {what}: its owner gives it only to those who accepted the terms at "
            f"{page} ({self.hub} answers {status}; {token} may have it)",
            code="gated_model",
            hint=f"{self.with_token}   # after accepting the terms at {page}",
            page=page,
        )

    def _unauthorised(self, what: str, status: int) -> RbeeError:
        if self.has_token:
            why = "it does not accept the token (needed: a valid one in HF_TOKEN)"
        else:
            why = "there is no such repository, or it is private (needed: a token in HF_TOKEN)"
        return UnauthorizedError(
            f"cannot fetch {what}: {self.hub} answers {status}: {why}",
            code="hub_unauthorized",
            hint=self.with_token,
        )

    def _missing(self, what: str, code: str, file: str) -> RbeeError:
        if code == "RevisionNotFound":
            return NotFoundError(
                f"hf:{self.repo} has no revision {self.revision!r} (needed: a branch, a tag or a "
                f"commit; asked: {self.hub})",
                code="revision_not_found",
                hint=f"rbee-keeper model pull hf:{self.repo}",
            )
        if file:
            return PeerError(
                f"cannot fetch {what}: {self.hub} lists the file and then answers 404",
                code="hub_failed",
                hint=f"rbee-keeper model pull {self.name}",
            )
        token = "" if self.has_token else "; a private one needs a token in HF_TOKEN"
        return NotFoundError(
            f"there is no model {self.name} at {self.hub} (answer: 404{token})",
            code="model_not_found",
            hint="rbee-keeper model list",
        )

    # no answers ----------------------------------------------------------------------------------

    def unreachable(self, why: str) -> RbeeError:
        return UnavailableError(
            f"cannot fetch {self.name}: {self.hub} cannot be reached: {why}",
            code="hub_unreachable",
            hint=f"curl -I {shlex.quote(self.hub)}   # HF_ENDPOINT can name another hub or mirror",
            endpoint=self.hub,
        )

    def nonsense(self, why: str) -> RbeeError:
        return PeerError(
            f"cannot fetch {self.name}: {self.hub} does not answer as a hub does: {why}",
            code="hub_failed",
            hint=shlex.join(["curl", "-i", f"{self.hub}/api/models/{self.repo}"]),
        )
