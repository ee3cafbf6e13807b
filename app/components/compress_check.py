"""Whether a plan that was applied gave what it says: keys, errors of weights, logits and routers."""

from __future__ import annotations

import streamlit as st

from app import state
from app.components import table
from app.components.table import Column
from app.frames import compress_check as frames
from compressor.plan import Plan
from moescope.errors import StoreError
from store import Run


def section(run: Run, plan: Plan) -> None:
    """Draw the section; nothing where the plan was not applied, or quantizes nothing."""
    document = frames.document(run, plan.digest)
    if document is None:
        return
    try:
        passed, sentence = frames.verdict(document)
        worst, flips = frames.worst(document), frames.flips(document)
    except StoreError as error:
        st.error(state.plain(str(error), 300))
        return
    words = state.plain(sentence, 800)
    if passed is None:
        st.warning(f"The applied model was not looked at. {words}", icon=":material/help:")
    elif passed:
        st.success(f"The applied model is what the plan says. {words}", icon=":material/check_circle:")
    else:
        st.error(f"The applied model is not what the plan says. {words}", icon=":material/error:")
    if worst.is_empty() and flips.is_empty():
        return
    with st.expander("All figures: the matrices nearest to what no longer passes, and the routers",
                     icon=":material/table:"):  # fmt: skip
        table.show(
            worst, key="check-worst", bordered=False, alt="Matrices with the most unusual errors",
            columns={"low": Column("low"), "high": Column("high")},
            read="Error of a matrix: ||Q(W) - W|| / ||W||; from low to high is what its width makes.",
        )  # fmt: skip
        if len(flips):
            table.show(
                flips, key="check-flips", bordered=False, alt="Router flips by layer",
                columns={"flips": Column("flips", "share"), "kl": Column("KL, nats")},
                read="Share of the routers' selections that are others than before, on the same tokens.",
            )  # fmt: skip
