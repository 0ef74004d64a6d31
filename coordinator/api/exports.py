"""`GET /api/admin/export`: a version in the files of other software, for operators."""

from __future__ import annotations

from typing import Any

from tornado.web import RequestHandler

from bitnet_ext.exports.provenance import VARIANTS, Format, Variant
from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.api.base import Api
from coordinator.api.files import FileHandler
from coordinator.domain.errors import RefusedError
from coordinator.service.downloading import open_archive
from coordinator.service.exporting import parse_version


class ExportHandler(FileHandler):
    """`/api/admin/export?version=...&format=...&variant=...`: a tar file."""

    async def prepare(self) -> None:
        """Let in operators alone: a key of workers is not enough."""
        if not await self.api.is_operator(self):
            raise RefusedError(ErrorCode.UNAUTHORIZED, "a login is needed")
        self.check_size()

    async def get(self) -> None:
        """Answer with the exported folder in one file."""
        # What is missing is refused as what is empty: with the name of its field.
        wish = parse_version(self.get_query_argument("version", ""))
        variant = self._variant()
        name, source = await open_archive(self.api.fleet, wish, variant)
        self.set_header("Content-Disposition", f'attachment; filename="{name}.tar"')
        await self.serve(source)

    def _variant(self) -> tuple[Format, Variant]:
        """Return format and variant. Raises RefusedError `bad_request`."""
        wished = self.get_query_argument("format", "")
        if wished not in list(Format):
            raise _refused("format", list(Format), wished)
        form = Format(wished)
        chosen = self.get_query_argument("variant", VARIANTS[form][0])
        if chosen not in VARIANTS[form]:
            raise _refused("variant", VARIANTS[form], chosen)
        return form, Variant(chosen)


def _refused(field: str, due: Any, got: str) -> RefusedError:
    return RefusedError(
        ErrorCode.BAD_REQUEST,
        f"{field} must be one of {', '.join(due)}, got {got[:80]!r}",
        field=field,
    )


def export_routes(api: Api) -> list[tuple[str, type[RequestHandler], dict[str, Any]]]:
    """Return the rows of the route table."""
    return [(r"/api/admin/export", ExportHandler, {"api": api})]
