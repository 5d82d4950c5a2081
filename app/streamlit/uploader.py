"""Choosing files and sending them to the data folder: `st.file_uploader` would hold them in memory."""

from __future__ import annotations

from typing import Any

import streamlit as st

_HTML = """<div class="upload">
<button type="button" class="choose"></button><button type="button" class="cancel" hidden>Cancel</button>
<progress max="1" value="0" hidden></progress><span class="told" role="status"></span><input type="file" hidden>
</div>"""

_CSS = """
.upload {display: flex; gap: .8rem; align-items: center; flex-wrap: wrap; padding: .8rem; font: inherit;
  border: 1px dashed var(--st-border-color); border-radius: .5rem; color: var(--st-text-color)}
.upload.over {border-color: var(--st-primary-color)}
button {font: inherit; color: inherit; background: var(--st-secondary-background-color); padding: .35rem .8rem;
  border: 1px solid var(--st-border-color); border-radius: .5rem; cursor: pointer}
progress {flex: 1 1 120px; accent-color: var(--st-primary-color)}
.told.bad {color: #ff8a80}
[hidden] {display: none !important}
"""

# The files of one choice go one after another; the first begins the upload anew, so that choosing again replaces.
_JS = """
class Upload {
  constructor(root) {
    for (const name of ['choose', 'cancel', 'told']) this[name] = root.querySelector('.' + name)
    this.progress = root.querySelector('progress')
    this.input = root.querySelector('input')
    this.choose.onclick = () => this.input.click()
    this.input.onchange = () => this.send([...this.input.files])
    this.cancel.onclick = () => this.stop()
    root.ondragover = event => { event.preventDefault(); root.classList.toggle('over', true) }
    root.ondragleave = () => root.classList.toggle('over', false)
    root.ondrop = event => {
      event.preventDefault()
      root.classList.toggle('over', false)
      if (!this.c.data.folder) this.send([...event.dataTransfer.files])
    }
  }

  stop() {
    this.cancelled = true
    this.request?.abort()
  }

  update(c) {
    this.c = c
    this.input.multiple = true
    this.input.webkitdirectory = c.data.folder
    this.choose.textContent = c.data.folder ? 'Choose a folder' : 'Choose files'
    if (!this.told.textContent) this.tell(c.data.folder ? '' : 'or drop them here')
  }

  tell(text, bad) {
    this.told.textContent = text
    this.told.classList.toggle('bad', !!bad)
  }

  async send(files) {
    this.input.value = ''
    files = files.filter(file => !file.name.startsWith('.'))
    if (!files.length || this.request) return
    this.c.setStateValue('sent', null)
    const bytes = files.reduce((sum, file) => sum + file.size, 0)
    if (bytes > this.c.data.largest) return this.tell(`more than ${this.c.data.largest / 2 ** 20} MB`, true)
    this.cancelled = false
    this.cancel.hidden = this.progress.hidden = false
    this.choose.disabled = true
    let done = 0
    try {
      const choice = Date.now() // a request of an earlier choice may still be on its way
      for (const [i, file] of files.entries()) {
        this.tell(`sending ${i + 1} of ${files.length}`)
        if (this.cancelled) throw new Error()
        await this.post(file, choice, i + 1, now => { this.progress.value = (done + now) / (bytes || 1) })
        done += file.size
      }
      this.tell(`${files.length === 1 ? '1 file is' : files.length + ' files are'} there`)
      this.c.setStateValue('sent', { id: this.c.data.id, files: files.length })
    } catch (error) {
      this.tell(this.cancelled ? 'cancelled' : error.message, !this.cancelled)
    }
    this.request = null
    this.choose.disabled = false
    this.cancel.hidden = this.progress.hidden = true
  }

  post(file, choice, part, onprogress) {
    return new Promise((resolve, reject) => {
      const request = this.request = new XMLHttpRequest()
      request.open('POST', this.c.data.url)
      request.setRequestHeader('X-Medseg-Token', this.c.data.token)
      request.setRequestHeader('X-Medseg-Choice', choice)
      request.setRequestHeader('X-Medseg-Part', part)
      request.upload.onprogress = event => onprogress(event.loaded)
      request.onload = () => {
        if (request.status === 201) return resolve()
        let problem = `refused (${request.status})`
        try { problem = JSON.parse(request.responseText).error } catch {}
        reject(new Error(problem))
      }
      request.onerror = request.onabort = () => reject(new Error('the connection ended; choose again'))
      request.send(file)
    })
  }
}

export default function (c) {
  const root = c.parentElement.querySelector('.upload')
  root.medsegUpload ??= new Upload(root)
  root.medsegUpload.update(c)
  return () => root.medsegUpload.stop() // another view is shown: a later choice must not find parts of this one
}
"""


def uploader(upload_id: str, *, url: str, token: str, folder: bool, largest: int, key: str) -> int:
    """Let somebody choose files and send them.

    Args:
        upload_id: random; a new one forgets what was sent.
        url: of the route that takes a file.
        token: signed claim for it.
        folder: a whole folder is chosen, instead of files.
        largest: bytes in all.
        key: constant over runs.

    Returns:
        How many files have arrived; 0 until all that were chosen have.
    """
    component = st.components.v2.component("medseg_upload", html=_HTML, css=_CSS, js=_JS, isolate_styles=True)
    result = component(
        key=key,
        data={"id": upload_id, "url": url, "token": token, "folder": folder, "largest": largest},
        on_sent_change=lambda: None,
    )
    sent: Any = result.get("sent")
    return int(sent["files"]) if isinstance(sent, dict) and sent.get("id") == upload_id else 0
