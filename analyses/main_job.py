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
# The subject's embeddings are spoiled with Gaussian noise of three standard deviations; then one state of the
# clean run is restored at a time. An effect of 1 means that the state brings the whole answer back. What is
# measured is the log probability of the model's own greedy answer, eight tokens of it.

# %%
trace = ld.trace(model, requests[:3])
trace

# %%
trace.by_role().round(3)

# %% [markdown]
# ## See
# Rows are layers, columns are roles: a role is what a token is in its prompt, and carries over to other prompts.
# Outlined are the sites that `locate` chooses.

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
# value that arrives in wordings kept aside; the leaks are what harmless text would see of it.

# %%
edit = ld.edit(model, requests, sites)
edit

# %% [markdown]
# ## Check
# Made, measured, unmade. Wordings and wrappers are those that the edit never saw. Intervals are by subject.

# %%
report = ld.check(model, edit, ld.suite("core").small())
report

# %% [markdown]
# ## For good, and back
# The ledger is the one place that changes a model for good; undo restores the original bits.

# %%
from lens_defense.weights import fingerprint

before = fingerprint(model)
ledger = ld.Ledger(model)
ledger.apply(edit)
during = fingerprint(model)
ledger.undo()
before, during, fingerprint(model)

# %% [markdown]
# ## By hand
# The same as a form: select cells of the map by click or by a box, press Plan to see the forecast, Apply, ask any
# question before and after side by side, Undo. Run the cell to use it (what a reader without a kernel sees is a picture
# of it); the notebook's own interrupt stops long work.

# %%
ld.Explorer(model, trace, requests, sites=sites)
