# %% [markdown]
# # How do I make a model refuse, by hand?
#
# With the explorer: a page where you choose cells of a map, plan an edit, look at its forecast, make it,
# ask the model anything, and take it back. You can click all of it. So that this notebook also reads well
# without clicks, Python presses the buttons here, and each cell says which one. What Python does, the page
# shows, and the other way round.
#
# ![The explorer](../figures/explorer.png)
#
# The model is SmolLM2-135M-Instruct. It answers nearly everything, so whatever it refuses in the end is our
# doing. Answers are cut after twelve tokens. Two to three minutes on two cores.

# %%
import lens_defense as ld

model = ld.load("smollm2")
requests = ld.requests("core")[5:8]
trace = ld.trace(model, requests)
explorer = ld.Explorer(model, requests, trace, max_new_tokens=12)
for request in requests:
    print(f"{request.text}\n    subject: {request.subject}")


def press(button, **values):
    """Press a button of the page, and wait until its work is done."""
    explorer.do(button, **values)
    explorer.worker.wait()
    print(explorer.message or f"{button}: done")


# %% [markdown]
# ## 1. Choose cells
# **Click** *Suggest* for what `locate` finds, or any cell; shift-click adds one, a box adds many. What you
# chose is `explorer.sites`, and you can set that too.

# %%
explorer.do("suggest")
explorer

# %%
explorer.sites = explorer.sites[1:]  # the page above has followed
explorer.sites

# %% [markdown]
# ## 2. Plan
# **Click** *Plan*. It takes a minute, and a bar on the page counts. Nothing is changed yet: a plan is a
# low-rank change for each layer and a forecast. `reach` is how much of the refusal arrives in words that
# the plan has not seen (1 is all); `reach in harmless uses` is the same in harmless questions about the
# subject and should be near 0.

# %%
press("plan")
edit = explorer.edit
edit

# %% [markdown]
# ## 3. Ask before
# **Type** a question and press Enter.

# %%
press("ask", question=requests[2].text)
explorer.answers

# %% [markdown]
# ## 4. Apply, and ask again
# **Click** *Apply*. Of each question there are now two answers: without the edit, and with it.

# %%
from lens_defense.models.mlp_output import weights_fingerprint

original = weights_fingerprint(model)
press("apply")
press("ask", question=requests[2].text)
explorer.answers

# %% [markdown]
# An edit should refuse the harmful use of a subject and leave the rest alone:

# %%
harmless = "Can the police trace a blackmail letter?", "What is the capital of France?"
for question in harmless:
    press("ask", question=question)
    print(f"{question}\n  without: {explorer.answers[0]}\n  with:    {explorer.answers[1]}")

# %% [markdown]
# ## 5. Stronger or weaker
# **Move** *strength* before you apply: the plan is scaled, and not fitted again. Here we undo, take half of
# the change, and ask once more.

# %%
press("undo")
explorer.edit = edit
press("set_plan", strength=0.5)
press("apply")
press("ask", question=requests[2].text)
explorer.answers

# %% [markdown]
# The page as it stands now:

# %%
explorer

# %% [markdown]
# ## 6. Take it back
# **Click** *Undo*, or *Remove* beside any edit. The weights are what they were, bit for bit.

# %%
edited = weights_fingerprint(model)
press("undo")
{"original": original, "edited": edited, "undone": weights_fingerprint(model)}

# %% [markdown]
# ## 7. Take it away
# At the foot of the page stands the Python that does all this again, beside files of the edit, the map and
# a report.

# %%
explorer.edit = edit
print(explorer.code_values())

# %% [markdown]
# Next: [measure what the edit did, and what it cost](check_the_result.ipynb).
