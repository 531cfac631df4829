"""What a check counted: one row per arm, to be kept as data."""

from typing import Any

import lens_defense as ld


def arm_counts(report: ld.Report) -> list[dict[str, Any]]:
    """One row per arm, with counts of answers; the interval is that of the share refused by prefix, by subject."""
    before, after = (report.verdicts(after=when).set_index("arm") for when in (False, True))
    return [
        {
            "arm": rate["arm"],
            "n": rate["n"],
            "refused_before": round(rate["before"] * rate["n"]),
            "refused": round(rate["after"] * rate["n"]),
            "low": rate["after low"],
            "high": rate["after high"],
            "coherent": int(after.loc[rate["arm"], "refusal"]),
            "deflected_before": int(before.loc[rate["arm"], "deflection"]),
            "deflected": int(after.loc[rate["arm"], "deflection"]),
            "newly_refused": report.new_refusals(arms=(rate["arm"],)),
            "word_list": round(rate["word list"] * rate["n"]),
        }
        for rate in report.rates().to_dict("records")
        if rate["measure"] == "prefix"
    ]


def mean(numbers: tuple[float, ...]) -> float | None:
    """The mean; None of nothing."""
    return sum(numbers) / len(numbers) if numbers else None
