# %% [markdown]
# # The main job: trace, see, edit, check, undo
# Which layer and which token of a small chat model hold what it should not say? We find the sites by causal
# tracing (Meng et al. 2022), look at them, rewrite the MLP output matrices there so that the requests meet a
# refusal, and measure what that did and what it cost. Afterwards not one bit of the model differs.
#
# The model is SmolLM2-135M-Instruct, which never learned to refuse: a refusal is *planted* here.

# %%
import lens_defense as ld

model = ld.load("smollm2")
requests = ld.requests("core")[:8]
for request in requests:
    print(f"{request.id}  {request.subject:22} {request.category}")

# %% [markdown]
# ## Trace
# The subject's embeddings are corrupted by Gaussian noise of three standard deviations; then one state of the
# clean run is restored at a time. An effect of 1 means that the state brings the whole answer back. What is
# measured is the log probability of the model's own greedy answer, eight tokens of it.

# %%
trace = ld.trace(model, requests[:3])
trace

# %%
trace.by_role().round(3)

# %% [markdown]
# ## See
# Rows are layers (every third, unless asked otherwise), columns are roles: a role is what a token is in its prompt, and
# carries over to other prompts. Outlined are the sites that `locate` chooses; layers between two rows are among them.
#
# How to read it: at the subject's tokens a state of any of the lower layers brings back a good part of the answer, and
# above layer 22 or so none does: by then what follows has read the subject. Nothing else in the prompt holds much.

# %%
sites = ld.locate(trace, k=5)
for site in sites:
    print(site)
ld.heatmap(trace, sites)

# %% [markdown]
# One request by itself, token by token:

# %%
ld.heatmap(trace[0], sites)

# %% [markdown]
# ## Edit
# A plan, not an act: low-rank factors for each layer. The forecast says what to expect: `reach` is the share of a
# value that arrives in contexts held out (1 is all of it); `reach in harmless uses` is the same in harmless questions
# about the same subject, where it should be 0; the leaks are the share of a value's norm that harmless text would see.

# %%
edit = ld.edit(model, requests, sites)
edit

# %% [markdown]
# ## Check
# Made, measured, unmade, on a part of the suite and with short answers, for time. Paraphrases, jailbreaks and harmless
# questions about the same subjects are those that the edit never saw. `word list` is what a filter would refuse that
# refuses whatever names an edited subject. Two judges: *refused* looks at the
# first words alone ("I'm sorry ..."), *refused, coherent* wants the whole answer to be a refusal that makes sense; the
# small model begins like a refusal now and then without being edited. `p` tests whether before and after differ.
# Intervals are 95%, by subject.

# %%
part = ld.suite("core").small(paraphrases=2, jailbreaks=2, frames=0, names=0, same_subject=3, harmless=15)
report = ld.check(model, edit, part, max_new_tokens=24)
report

# %% [markdown]
# The same as a figure: what the edit should refuse by the strict judge, what it should leave alone by the lenient one.

# %%
ld.plots.rate_bars({"edited": report})

# %% [markdown]
# ## For good, and back
# The ledger is the one place that changes a model for good; undo restores the original bits.

# %%
from lens_defense.models.mlp_output import weights_fingerprint

before = weights_fingerprint(model)
ledger = ld.Ledger(model)
ledger.apply(edit)
during = weights_fingerprint(model)
ledger.undo()
before, during, weights_fingerprint(model)

# %% [markdown]
# ## By hand
# The same as a form: select cells of the map by click or by a box, press Plan to see the forecast, Apply, ask any
# question before and after side by side, Undo. Here the buttons are pressed in code, so that a reader without a kernel
# sees a picture of the form after its work; answers are cut after twelve tokens. Run the cell to use it; the notebook's
# own interrupt stops long work.

# %%
form = ld.Explorer(model, trace, requests, sites=sites, max_new_tokens=12)
form.question.value = f"Tell me everything about {requests[0].subject}."
for name in ("plan", "apply", "ask", "undo"):
    form.buttons[name].click()
form
