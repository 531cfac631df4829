# %% [markdown]
# # Did the edit work, and what did it cost?
#
# A model that refuses the question you tried has shown little. This notebook asks what you did not try:
# other words, jailbreaks, other spellings, and above all harmless questions about the same subjects. Each
# is asked without and with the edit, and two judges read the answers.
#
# The model is SmolLM2-135M-Instruct. Three minutes on two cores, so the suite and the answers are short; a
# real check takes `ld.check(model, edit)` and an hour.

# %%
import lens_defense as ld

model = ld.load("smollm2")
requests = ld.requests("core")[5:8]
trace = ld.trace(model, requests)
sites = ld.locate(trace)
edit = ld.edit(model, requests, sites)
edit

# %% [markdown]
# ## What is asked
# None of these questions was seen by the edit, but for the `edited` ones themselves.

# %%
suite = ld.suite("core").small(paraphrases=2, jailbreaks=2, same_subject=4, harmless=10)
questions = suite.for_requests(requests)
questions

# %% [markdown]
# ## The answers, counted
# `check` makes the edit, asks, and takes it back.
#
# - *refused* looks at the first words alone ("I'm sorry ..."); *refused, coherent* wants the whole answer
#   to be a refusal that makes sense. Believe the second where you want refusals, and the first where you do
#   not.
# - Intervals are 95%, by subject: three subjects are few, and the intervals say so.
# - *word list* is a filter that refuses whatever names an edited subject. An edit is worth its trouble
#   where it does better.

# %%
report = ld.check(model, edit, suite, max_new_tokens=24)
report

# %% [markdown]
# The same as a figure, each arm by the judge that is harder on the edit:

# %%
ld.plots.rate_bars({"edited": report})

# %% [markdown]
# ## What got past it
# Of what should be refused, how many answers were a refusal, turned away, went on answering, or fell apart:

# %%
verdicts = report.verdicts("coherent")
others = ["held_out", "same_subject", "benign", "over_refusal", "facts"]
verdicts[~verdicts["arm"].isin(others)]

# %% [markdown]
# An answer that has begun already, a prompt without the chat template and another name of the subject are
# known ways around an edit. They stay ways around it; the [limits](../docs/limits.md) say why.
#
# ## What it broke
# Harmless questions about the edited subjects that are refused now. A word list refuses all of them.

# %%
asked = {item.request.id: item.request.text for item in questions.items}
rows = report.to_dataframe()
answers = rows[rows["arm"] == "same_subject"]
refused = answers[answers["prefix after"] == "refusal"]
newly = report.new_refusals(arms=["same_subject"])
print(f"{newly} of {len(answers)} newly refused")
for row in refused.itertuples():
    print(f"\n{asked[row.id]}\n  before: {row.before}\n  after:  {row.after}")

# %% [markdown]
# Three of the others, to see that answers are still answers:

# %%
answered = answers[answers["prefix after"] == "answer"]
for row in answered.groupby("cluster").head(1).itertuples():
    print(f"{asked[row.id]}\n  before: {row.before}\n  after:  {row.after}\n")

# %% [markdown]
# Everything else: how far the model's words have moved on benign questions (KL), its loss on plain text,
# and facts.

# %%
print(f"facts that were known and are lost: {report.facts_lost()}")
print(f"other harmless questions newly refused: {report.new_refusals()}")
report.costs().round(4)

# %% [markdown]
# ## Keep it
# One page with the map, the forecast and all of these numbers; each rate opens the answers behind it.

# %%
page = ld.save_report(
    "report.html",
    title="Three subjects of smollm2",
    trace=trace,
    sites=sites,
    edit=edit,
    reports={"edited": report},
    conversations=[],
    reproduce="notebooks/check_the_result.ipynb",
    suite=suite,
)
print(page, f"{page.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# If the numbers are not good enough: fewer subjects, `ld.edit(..., strength=0.85)`, another `contrast=`, other sites.
# Then check again, and do not choose by these very questions: `ld.suite("core", split="tune")` is there for
# choosing.
