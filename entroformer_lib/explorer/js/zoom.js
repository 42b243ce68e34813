// Enlarges maps with two fingers or Ctrl and the wheel, moves them by dragging, and tells taps and hovering apart.

const MOST = 8;
const STILL = 6; // pixels that a tap may move

export class Zoom {
  constructor() {
    Object.assign(this, { scale: 1, x: 0, y: 0, canvases: [] });
  }

  /** view: the frame around a canvas. tap(u, v), hover(u, v or null): places as fractions of the canvas. */
  attach(view, canvas, tap, hover) {
    this.canvases = this.canvases.filter((c) => c.isConnected || c === canvas).concat(canvas);
    const pointers = new Map();
    let [moved, several] = [0, false];
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    };
    view.addEventListener("pointerdown", (event) => {
      if (event.button) return; // the right button opens the browser's menu
      pointers.set(event.pointerId, event);
      [moved, several] = pointers.size > 1 ? [moved, true] : [0, false];
      if (this.scale > 1 || pointers.size > 1) view.setPointerCapture(event.pointerId);
    });
    view.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before) return hover(...place(event), event);
      const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY];
      moved += Math.hypot(dx, dy);
      const box = view.getBoundingClientRect();
      const others = [...pointers.values()].filter((p) => p.pointerId !== event.pointerId);
      if (others.length) {
        const distance = (p) => Math.hypot(p.clientX - others[0].clientX, p.clientY - others[0].clientY);
        const middle = [
          (event.clientX + others[0].clientX) / 2 - box.left,
          (event.clientY + others[0].clientY) / 2 - box.top,
        ];
        this.by(distance(event) / Math.max(distance(before), 1), middle[0] / box.width, middle[1] / box.height);
      } else if (this.scale > 1 && moved > STILL) {
        this.to(this.scale, this.x + dx / box.width, this.y + dy / box.height);
      }
      pointers.set(event.pointerId, event);
    });
    const leave = (event) => pointers.delete(event.pointerId);
    view.addEventListener("pointerup", (event) => {
      const alone = pointers.has(event.pointerId) && !several && moved <= STILL;
      leave(event);
      if (alone) tap(...place(event), event);
    });
    view.addEventListener("pointercancel", leave);
    view.addEventListener("pointerleave", (event) => {
      leave(event); // whoever lets go outside is not seen
      hover(null);
    });
    view.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey) return;
        event.preventDefault();
        const box = view.getBoundingClientRect();
        this.by(
          Math.exp(-event.deltaY / 200),
          (event.clientX - box.left) / box.width,
          (event.clientY - box.top) / box.height,
        );
      },
      { passive: false },
    );
    this.apply();
  }

  /** Enlarges around a place of the frame. */
  by(factor, u = 0.5, v = 0.5) {
    const scale = Math.min(Math.max(this.scale * factor, 1), MOST);
    this.to(scale, u - ((u - this.x) * scale) / this.scale, v - ((v - this.y) * scale) / this.scale);
  }

  /** x, y: where the canvas begins, in fractions of the frame. */
  to(scale, x, y) {
    const clip = (value) => Math.min(Math.max(value, 1 - scale), 0);
    Object.assign(this, { scale, x: clip(x), y: clip(y) });
    this.apply();
  }

  apply() {
    for (const canvas of this.canvases) {
      canvas.style.transform =
        this.scale === 1 ? "" : `translate(${100 * this.x}%, ${100 * this.y}%) scale(${this.scale})`;
      canvas.parentElement.style.touchAction = this.scale === 1 ? "pan-x pan-y" : "none";
    }
  }
}
