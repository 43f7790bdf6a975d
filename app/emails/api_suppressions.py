"""/api/suppressions"""

from typing import Any

from django.core.exceptions import ValidationError
from django.http import Http404
from ninja import Query, Router, Status

from emails import listing
from emails.api_schemas import (
    Detail,
    Errors,
    Request,
    SuppressionIn,
    SuppressionOut,
    SuppressionPage,
)
from emails.models import Suppression
from emails.validation import check_address

router = Router()


@router.get(
    "",
    response={200: SuppressionPage, 401: Detail, 422: Errors},
    summary="List and search suppressed addresses, newest first",
)
def list_suppressions(
    request: Request,
    q: str = Query("", description="Part of an address."),
    before: int | None = Query(None, description="`next` of the previous page."),
    limit: int = Query(50, ge=1, le=200),
) -> Any:
    found = listing.find_suppressions(request.auth.owner, q)
    if before is not None:
        found = found.filter(pk__lt=before)
    page = list(found.order_by("-pk")[: limit + 1])
    more = len(page) > limit
    return {"suppressions": page[:limit], "next": page[limit - 1].pk if more else None}


@router.post(
    "",
    response={200: SuppressionOut, 201: SuppressionOut, 400: Detail, 401: Detail, 422: Errors},
    summary="Suppress an address",
)
def suppress(request: Request, suppression: SuppressionIn) -> Any:
    """Refuses the owner's emails to the address. Returns 200 if it is already suppressed."""
    try:
        check_address(suppression.address)
    except ValidationError as error:
        raise ValidationError({"address": error}) from None
    found, new = Suppression.objects.get_or_create(
        owner=request.auth.owner, address=suppression.address.lower()
    )
    return Status(201 if new else 200, found)


@router.delete(
    "/{suppression_id}",
    response={204: None, 401: Detail, 404: Detail, 422: Errors},
    summary="Remove an address from the suppression list",
)
def unsuppress(request: Request, suppression_id: int) -> Any:
    """Takes the id, not the address, so that the address is not in access logs."""
    found = Suppression.objects.filter(owner=request.auth.owner, pk=suppression_id)
    deleted, _ = found.delete()
    if not deleted:
        raise Http404
    return Status(204, None)
