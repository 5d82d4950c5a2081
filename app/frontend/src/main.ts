/** Entry: Streamlit calls it when the component appears and after each run of the page. */

import { Viewer, type Component } from './viewer'

const viewers = new WeakMap<Element, Viewer>()

export default function render(component: Component): () => void {
  const root = component.parentElement.querySelector<HTMLElement>('.medseg-viewer')
  if (!root) throw new Error('the viewer has no place in the page')
  const known = viewers.get(root)
  if (known) known.update(component)
  else {
    const viewer = new Viewer(root, component)
    viewers.set(root, viewer)
    if (component.data.test) Object.assign(window, { __medseg_test: viewer.probe() })
  }
  return () => {
    viewers.get(root)?.destroy()
    viewers.delete(root)
  }
}
