// Updates counts and states, but not a form that the user is filling in.
const PERIOD = 3000;

async function refresh() {
  if (!document.hidden) {
    try {
      const response = await fetch(location.href, { redirect: "error" });
      const page = new DOMParser().parseFromString(await response.text(), "text/html");
      const live = page.getElementById("live");
      if (response.ok && live) {
        showLocalTimes(live);
        document.getElementById("live").replaceWith(live);
      }
    } catch {
      // Logged out or offline: the list stays as it is.
    }
  }
  setTimeout(refresh, PERIOD);
}

setTimeout(refresh, PERIOD);
