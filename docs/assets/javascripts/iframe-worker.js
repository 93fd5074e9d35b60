// Browsers start no worker in a page that was opened from a folder. There, the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.frame = frame
      const load = (...sources) => sources.reduce((before, source) => before.then(() => new Promise((done) => {
        const script = document.createElement("script")
        script.src = source
        script.onload = done
        document.body.appendChild(script)
      })), Promise.resolve())
      frame.contentDocument.open()
      frame.contentDocument.write(
        `<html><body><script>postMessage = (data) => parent.postMessage(data, "*"); importScripts = ${load}` +
        `</` + `script><script src="${url}"></` + `script></body></html>`)
      frame.contentDocument.close()
      this.receive = (event) => {
        if (event.source !== frame.contentWindow) return
        const message = new MessageEvent("message", {data: event.data})
        this.dispatchEvent(message)
        if (this.onmessage) this.onmessage(message)
      }
      addEventListener("message", this.receive)
      this.ready = new Promise((done) => { frame.contentWindow.onload = done })
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data})))
    }

    terminate() {
      removeEventListener("message", this.receive)
      this.frame.remove()
    }
  }
}
